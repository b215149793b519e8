"""What is made of a trained run: merged model, predictions, chat, report, exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.cli.base_model import with_base_model
from tunesmith.cli.console import console, say
from tunesmith.cli.outcome import work_on
from tunesmith.cli.target import path_prefix, target_of, usable_run
from tunesmith.core.errors import UsageError
from tunesmith.core.files import short_digest
from tunesmith.plan import build, prediction
from tunesmith.project import Project
from tunesmith.targets import factory

# Of a page's name: with a suffix of ours it must fit into the 255 bytes of a file's.
_LONGEST = 200


def merge(
    root: Path,
    on: str,
    run: str | None,
    overrides: tuple[str, ...],
    *,
    accept: bool = False,
    dry: bool,
) -> None:
    """Merge and prove a run's adapter; `accept`: although its prompts differ from the trained."""
    project = Project.at(root)
    target = target_of(project, on)
    run_id = usable_run(project, target, run, dry=dry)
    plan = build.plan_merge(project, target, run_id, overrides, accept=accept)
    if not dry:
        work_on(target, plan)
        say(f"merged model: {path_prefix(target)}{plan.location.run / 'merged'}")
        return
    say(plan.render())


def predict(
    root: Path,
    on: str,
    config: Path,
    run: str | None,
    overrides: tuple[str, ...],
    *,
    mirror: str,
    dry: bool,
) -> None:
    """Answer a data set with LLaMA-Factory's do_predict and print the scores."""
    project = Project.at(root)
    target = target_of(project, on)
    run_id = usable_run(project, target, run, dry=dry) if run else None
    plan = prediction.plan_predict(project, target, config, overrides, run_id, mirror or None)
    if dry:
        say(plan.render())
        return
    if run is None and "fetch" not in plan.phases:
        plan = with_base_model(project, plan, mirror or "default")
    summary = work_on(target, plan)
    for name, value in sorted((summary.metrics or {}).items()):
        say(f"{name:<36} {value}")
    answers = Path(summary.output or "") / "generated_predictions.jsonl"
    say(f"answers: {path_prefix(target)}{answers}")


def chat(
    root: Path,
    on: str,
    run: str | None,
    *,
    what: str,
    prompt: str,
    system: str,
    greedy: bool,
    max_new_tokens: int,
    dry: bool,
) -> None:
    """Open a chat, or answer one prompt."""
    project = Project.at(root)
    target = target_of(project, on)
    # A merged model needs no base model beside it.
    alone = what == "merged"
    run_id = target.find(run) if alone else usable_run(project, target, run, dry=dry)
    arguments = ["--run", str(target.location(run_id).run), "--what", what]
    arguments += ["--prompt", prompt] if prompt else []
    arguments += ["--system", system] if system else []
    arguments += ["--greedy"] if greedy else []
    arguments += ["--max-new-tokens", str(max_new_tokens)] if max_new_tokens else []
    if dry:
        say(f"python -I -m tunesmith.job.evaluation.chat {' '.join(arguments)}")
        return
    code = target.interact("tunesmith.job.evaluation.chat", arguments)
    if code:
        raise SystemExit(code)  # it has said why itself


def report(root: Path, on: str, run: str | None, *, language: str) -> Path:
    """Write the report and print the comparison."""
    from tunesmith.report.page import write_report
    from tunesmith.report.terminal import summary_table

    target = target_of(Project.at(root), on)
    folder = target.results(target.find(run))
    page = write_report(folder, language=language)
    console.print(summary_table(folder, language=language))
    say(f"report:  {page}")
    say(f"picture: {folder / 'training_loss.png'}")
    return page


def compare(root: Path, on: str, names: Sequence[str], *, language: str) -> Path:
    """Write a page that sets runs side by side, and print the table."""
    from tunesmith.report.compare import comparison_table, write_comparison

    project = Project.at(root)
    if len(set(names)) < 2:
        raise UsageError(
            "--compare takes two runs or more", hint="`inv report --compare RUN1 RUN2`"
        )
    target = factory.target_of(project, on, say)
    found = [target.find(name) for name in names]
    folders = [target.results(name) for name in found]
    page = write_comparison(
        folders, project.folder("comparisons") / page_name(found), language=language
    )
    console.print(comparison_table(folders, language=language))
    say(f"comparison: {page}")
    return page


def page_name(runs: Sequence[str]) -> str:
    """Return the file name of a comparison of runs: their ids, as far as a file's name can hold
    them all."""
    name = "+".join(runs)
    return f"{name if len(name) <= _LONGEST else f'{runs[0]}+{short_digest(runs)}'}.html"


def export(
    root: Path, on: str, run: str | None, kind: str, *, quantise: str, server: str, dry: bool
) -> None:
    """Turn a run's merged model into what another program takes, or check that it can."""
    target = factory.target_of(Project.at(root), on, say)
    arguments = ["--run", str(target.location(target.find(run)).run), "--format", kind]
    arguments += ["--quantise", quantise] if quantise else []
    arguments += ["--server", server] if server else []
    if dry:
        say(f"python -I -m tunesmith.job.export.export {' '.join(arguments)}")
        return
    code = target.interact("tunesmith.job.export.export", arguments)
    if code:
        raise SystemExit(code)  # it has said why itself
