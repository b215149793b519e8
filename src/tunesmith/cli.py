"""What tasks.py calls: one function a verb, which runs it and prints the outcome."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunesmith import runs
from tunesmith.dataset import registry
from tunesmith.dataset.report import DatasetReport
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import human_bytes
from tunesmith.follow import Detached, duration, follow
from tunesmith.hub import ModelFolder, Progress
from tunesmith.mirrors import load_mirror
from tunesmith.plan import Plan
from tunesmith.project import Project
from tunesmith.targets.base import Target

# In a pipe nothing knows the width: wide enough that a table's cells stay whole.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def train(
    root: Path, on: str, asked: runs.Asked, *, mirror: str, dry: bool, attach: bool
) -> str | None:
    """Train, follow, and end with the report; return the run id."""
    project = Project.at(root)
    target = runs.target_of(project, on)
    if dry:
        say(runs.plan_training(project, target, asked, None).render())
        return None
    # What can be wrong is found before anything is fetched.
    config = runs.read_config(project, asked.config, asked.overrides)
    for found in runs.plan_training(project, target, asked, None).request["data"]:
        # Without rows the file is none of ours: a hub's address.
        if found["rows"] is None:
            say(f"data set: {found['key']} from {found['file']} (not checked)")
            continue
        file = runs.shown(project, Path(found["file"]))
        rows, warnings = found["rows"], found["warnings"]
        say(f"data set: {found['key']} from {file} ({rows} rows checked, {warnings} warnings)")
    model = _model(project, str(config.get("model_name_or_path")), mirror, asked.revision)
    plan = runs.plan_training(project, target, asked, model)
    if "template" in config.overrides and not any(
        w.startswith("template=") for w in asked.overrides
    ):
        say(f"template: {config.get('template')} (that of {config.get('model_name_or_path')})")
    for item in plan.owned:
        if item.was not in (None, item.value) and item.key not in (
            "model_name_or_path",
            "output_dir",
        ):
            say(f"{item.key}: {item.was} -> {item.value} ({item.why})")
    run_id = runs.start_training(project, target, plan)
    say(f"run {run_id}")
    if not attach:
        say(f"started; `inv attach --run {run_id}` follows it")
        return run_id
    _finish(target, run_id)
    return run_id


def resume(root: Path, on: str, run: str | None, *, dry: bool) -> None:
    """Continue a run's unfinished phases and follow them."""
    project = Project.at(root)
    target = runs.target_of(project, on)
    run_id = project.run_folder(run).name
    status = target.status(run_id)
    left = [phase for phase, state in status["phases"].items() if state != "succeeded"]
    if status["state"] == "succeeded":
        raise UsageError(f"run {run_id} has succeeded; there is nothing to continue")
    if dry:
        say(f"would continue run {run_id} with {', '.join(left) or 'its first phase'}")
        return
    offset = target.events(run_id, 0)[1]
    target.start(run_id, left if set(left) & {"merge", "proof", "predict"} else ())
    say(f"run {run_id}")
    _finish(target, run_id, offset)


def attach(root: Path, on: str, run: str | None) -> None:
    """Follow a run to its end."""
    project = Project.at(root)
    target = runs.target_of(project, on)
    _finish(target, project.run_folder(run).name)


def stop(root: Path, on: str, run: str | None) -> None:
    """Ask for a checkpoint and an end, and wait for it."""
    project = Project.at(root)
    target = runs.target_of(project, on)
    run_id = project.run_folder(run).name
    target.stop(run_id)
    say(f"run {run_id}: stopping after a checkpoint")
    while (status := target.status(run_id))["state"] == "running":
        time.sleep(0.3)
    say(f"run {run_id}: {status['state']} at step {status.get('step')}; {status['message']}")


def list_runs(root: Path, on: str, *, as_json: bool) -> None:
    """Print every run."""
    found = runs.target_of(Project.at(root), on).runs()
    if as_json:
        say(json.dumps(found, ensure_ascii=False, indent=2))
        return
    if not found:
        say("no runs yet; `inv train` or `make demo` makes one")
        return
    table = Table(box=None, pad_edge=False)
    # An id is there to be copied: it is never cut.
    table.add_column("run", no_wrap=True, overflow="ignore")
    for name in ("state", "step", "loss", "phases"):
        table.add_column(name)
    for run in found:
        state = run["state"] + (f" ({run['failure']})" if run["failure"] else "")
        step = f"{run.get('step') or 0}/{run.get('total_steps') or '?'}"
        loss = f"{run['loss']:.4f}" if run.get("loss") is not None else ""
        table.add_row(run["run_id"], state, step, loss, _phases(run["phases"]))
    console.print(table)


def _phases(phases: dict[str, str]) -> str:
    """Return the phases in words; what has succeeded needs none beside its name."""
    return ", ".join(
        name if state == "succeeded" else f"{name} {state}" for name, state in phases.items()
    )


def logs(root: Path, on: str, run: str | None, *, follow: bool) -> None:
    """Print a run's log, and with `follow` what is added to it until the run ends."""
    project = Project.at(root)
    target = runs.target_of(project, on)
    run_id = project.run_folder(run).name
    offset = 0
    try:
        while True:
            running = target.status(run_id)["state"] in ("running", "queued")
            text, offset = target.log(run_id, offset)
            sys.stdout.write(text)
            sys.stdout.flush()
            if not (follow and running):
                return
            time.sleep(0.5)
    except KeyboardInterrupt:
        return


def merge(root: Path, on: str, run: str | None, overrides: tuple[str, ...], *, dry: bool) -> None:
    """Merge and prove a run's adapter."""
    project = Project.at(root)
    target = runs.target_of(project, on)
    plan = runs.plan_merge(project, run, overrides)
    if not dry:
        _work_on(target, plan)
        say(f"merged model: {plan.place.run / 'merged'}")
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
    target = runs.target_of(project, on)
    model = None
    if not dry and run is None:
        name = str(runs.read_config(project, config, overrides).get("model_name_or_path"))
        model = _model(project, name, mirror, None)
    plan = runs.plan_predict(project, target, config, overrides, run, model)
    if dry:
        say(plan.render())
        return
    summary = _work_on(target, plan)
    for name, value in sorted(summary["metrics"].items()):
        say(f"{name:<36} {value}")
    say(f"answers: {Path(summary['output']) / 'generated_predictions.jsonl'}")


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
    target = runs.target_of(project, on)
    arguments = ["--run", str(project.run_folder(run)), "--what", what]
    arguments += ["--prompt", prompt] if prompt else []
    arguments += ["--system", system] if system else []
    arguments += ["--greedy"] if greedy else []
    arguments += ["--max-new-tokens", str(max_new_tokens)] if max_new_tokens else []
    if dry:
        say(f"python -m tunesmith.job.chat {' '.join(arguments)}")
        return
    code = target.interact("tunesmith.job.chat", arguments)
    if code:
        raise SystemExit(code)  # it has said why itself


def report(root: Path, on: str, run: str | None, *, language: str) -> Path:
    """Write the report and print the comparison."""
    from tunesmith.report.page import write_report
    from tunesmith.report.terminal import summary_table

    project = Project.at(root)
    folder = runs.target_of(project, on).results(project.run_folder(run).name)
    page = write_report(folder, language=language)
    console.print(summary_table(folder, language=language))
    say(f"report:  {page}")
    say(f"picture: {folder / 'training_loss.png'}")
    return page


def demo(root: Path, *, mirror: str, dry: bool) -> None:
    """Do the main job with the small model: fetch, train, measure, merge, prove, report."""
    asked = runs.Asked(
        Path("configs/train/smollm2_135m_lora_sft.yaml"),
        prompts=Path("configs/prompts/philosophy.yaml"),
    )
    if dry:
        train(root, "local", asked, mirror=mirror, dry=True, attach=True)
        return
    began = time.monotonic()
    install_stack(root, None, mirror=mirror, dry=False)
    run_id = train(root, "local", asked, mirror=mirror, dry=False, attach=True)
    merge(root, "local", run_id, (), dry=False)
    report(root, "local", run_id, language="en")
    folder = Project.at(root).run_folder(run_id)
    say("")
    say(f"run:     {folder}")
    say(f"adapter: {folder / 'output'}")
    say(f"merged:  {folder / 'merged'}")
    say(f"chat:    .venv/bin/inv chat --run {run_id}")
    say(f"all in   {duration(time.monotonic() - began)}")


def check_data(root: Path, keys: str, dataset_dir: str, file: str) -> None:
    """Print what was found in registered data sets, or in one file. Raises when one has errors."""
    project = Project.at(root)
    if file and keys:
        raise UsageError("--file and --dataset both name data to check; give one of them")
    reports: tuple[DatasetReport, ...]
    if file:
        reports = (registry.check_unregistered(project.find(file)),)
    else:
        folder = project.find(dataset_dir)
        names = keys or ",".join(registry.load_registry(folder))
        reports = registry.check_registered(folder, names)
    for found in reports:
        rows = "not looked at" if found.rows is None else f"{found.rows} rows, {found.kept} kept"
        name = f"{found.key}: {found.file}" if found.key else found.file
        say(f"{name}: {rows}, {len(found.errors)} errors")
        for line in found.lines():
            say(f"  {line}")
    faulty = [found.key or found.file for found in reports if found.errors]
    if faulty:
        raise UsageError(f"data with errors: {', '.join(faulty)}; each fault is named above")


def register_data(
    root: Path, file: str, key: str, dataset_dir: str, *, replace: bool, dry: bool
) -> None:
    """Add a checked file to dataset_info.json."""
    project = Project.at(root)
    folder, path = project.find(dataset_dir), project.find(file)
    if dry:
        found = registry.check_unregistered(path)
        say(f"would register {key}: {path} ({found.rows} rows, {len(found.errors)} errors)")
        return
    entry = registry.register(folder, key, path, replace=replace)
    say(f"{folder / 'dataset_info.json'}: {key} -> {entry.file_name} ({entry.formatting})")


def fetch_model(
    root: Path,
    name: str,
    *,
    revision: str | None,
    mirror: str,
    from_path: str | None,
    allow_pickle: bool,
    dry: bool,
) -> None:
    """Fetch and verify one base model."""
    project = Project.at(root)
    if dry:
        profile = load_mirror(mirror, project.root / "configs" / "mirrors")
        known = runs.known_models(project).get(name)
        sources = ", ".join(known.sources) if known else "hub"
        say(f"would fetch {name} from {from_path or f'{sources} ({profile.hf_endpoints[0]})'}")
        return
    model = runs.fetch_model(
        project,
        name,
        _progress(),
        mirror=mirror,
        revision=revision,
        from_path=Path(from_path) if from_path else None,
        allow_pickle=allow_pickle,
    )
    _tell_model(model)


def list_models(root: Path) -> None:
    """Print configs/models.yml."""
    table = Table(
        "base model", "template", "weights", "licence", "sources", box=None, pad_edge=False
    )
    for model in runs.known_models(Project.at(root)).values():
        size = human_bytes(model.size_bytes)
        table.add_row(model.repo_id, model.template, size, model.licence, ", ".join(model.sources))
    console.print(table)


def show_stack(root: Path) -> None:
    """Print what is pinned, and which environments are here."""
    project = Project.at(root)
    stack = project.stack
    say(f"Python {stack.python}, LLaMA-Factory {stack.llamafactory}")
    for flavour in stack.flavours.values():
        default = " (default)" if flavour.name == stack.default_flavour else ""
        capabilities = ", ".join(flavour.compute_capabilities)
        installed = project.environment(flavour.name)
        state = f"installed in {installed.path}" if installed.current() else "not installed here"
        say(f"{flavour.name}{default}: CUDA {flavour.cuda}, {' '.join(flavour.requirements)}")
        say(f"  driver >= {flavour.minimum_driver}, compute capability {capabilities}")
        say(f"  lock {flavour.lock_sha256[:12]}, {human_bytes(flavour.size_bytes)}, {state}")
    for line in stack.requirements:
        say(f"  {line}")
    for key, value in sorted(stack.variables.items()):
        say(f"{key}={value}")


def lock_stack(root: Path, *, mirror: str, dry: bool) -> None:
    """Resolve the locks anew."""
    from tunesmith import environments

    project = Project.at(root)
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    if dry:
        for flavour in project.stack.flavours.values():
            say(f"would resolve {flavour.lock} from {len(project.stack.inputs(flavour))} lines")
        return
    for path in environments.lock(project.stack, project.root, profile):
        say(f"{path}")


def render_stack(root: Path, *, dry: bool) -> None:
    """Rewrite the files derived from the stack."""
    from tunesmith import derived

    project = Project.at(root)
    for path, text in derived.render(project).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            say(f"{path}: up to date")
        elif dry:
            say(f"{path}: would be rewritten")
        else:
            derived.write(path, text)
            say(f"{path}: rewritten")


def check_stack(root: Path) -> None:
    """Fail when a lock or a derived file is not of this stack.yml."""
    from tunesmith import derived, stack

    project = Project.at(root)
    lines = [*stack.drift(project.stack), *derived.drift(project)]
    if lines:
        raise TunesmithError(f"{len(lines)} files have drifted from configs/stack.yml", lines)
    say("locks and derived files are of this configs/stack.yml")


def install_stack(root: Path, flavour: str | None, *, mirror: str, dry: bool) -> None:
    """Install the training environment of this machine."""
    from tunesmith import environments

    project = Project.at(root)
    environment = project.environment(flavour)
    if dry:
        say(f"would install {environment.flavour.lock} in {environment.path}")
        return
    if environment.current():
        say(f"training environment: {environment.path} ({environment.flavour.name}, current)")
        return
    size = human_bytes(environment.flavour.size_bytes)
    say(f"training environment: installing {environment.flavour.name} ({size}) ...")
    began = time.monotonic()
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    versions = environments.install(project.stack, environment, project.root, profile)
    assert versions is not None
    say(
        f"training environment: {environment.path} (Python {versions['python']}, LLaMA-Factory "
        f"{versions['llamafactory']}, torch {versions['torch']}) in "
        f"{duration(time.monotonic() - began)}"
    )


def say(text: str) -> None:
    """Print a line as it is: no markup, no colour, no folding."""
    console.print(text, markup=False, soft_wrap=True)


def _model(project: Project, name: str, mirror: str, revision: str | None) -> ModelFolder:
    model = runs.fetch_model(project, name, _progress(), mirror=mirror, revision=revision)
    _tell_model(model)
    return model


def _tell_model(model: ModelFolder) -> None:
    size = human_bytes(sum(record.size for record in model.files.values()))
    how = "fetched and verified" if model.fetched else "verified before, unchanged"
    say(f"base model: {model.name} from {model.source} ({size}, {how})")
    say(f"  {model.path}")


def _progress() -> Callable[[Progress], None]:
    """Return a callback that tells about a download at most once a second."""
    said_at = 0.0

    def tell(progress: Progress) -> None:
        nonlocal said_at
        if progress.total is None or time.monotonic() - said_at >= 1:
            said_at = time.monotonic()
            say(f"  {progress.render()}")

    return tell


def _work_on(target: Target, plan: Plan) -> dict[str, Any]:
    """Start a plan's phases, follow them, and return the last phase's summary."""
    run_id = plan.place.run.name
    known = plan.place.run.exists()
    offset = target.events(run_id, 0)[1] if known else 0
    runs.start_on_run(target, plan)
    _await(target, run_id, offset)
    events, _ = target.events(run_id, offset)
    return next(e for e in reversed(events) if e["event"] == "summary")


def _finish(target: Target, run_id: str, offset: int = 0) -> None:
    """Follow a run; when it has succeeded, write its report."""
    _await(target, run_id, offset)
    folder = target.results(run_id)
    if (folder / "config.yaml").is_file():
        from tunesmith.report.page import write_report

        say(f"report: {write_report(folder)}")


def _await(target: Target, run_id: str, offset: int) -> None:
    """Follow a run to its end. Raises TunesmithError when it failed; leaves on Ctrl-C."""
    ended = follow(target, run_id, console, offset)
    if isinstance(ended, Detached):
        say(f"\nthe run goes on; `inv attach --run {run_id}` follows it, `inv stop` ends it")
        raise SystemExit(os.EX_OK)
    if ended["state"] == "failed":
        log = target.results(run_id) / "train.log"
        raise TunesmithError(f"run {run_id} failed: {ended['message']}", [f"log: {log}"])
    if ended["state"] == "stopped":
        say(f"run {run_id}: stopped at step {ended.get('step')}; {ended['message']}")
        raise SystemExit(os.EX_OK)
