"""Train, resume, follow and stop a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.cli.base_model import with_base_model
from tunesmith.cli.console import say
from tunesmith.cli.outcome import check_after, finish
from tunesmith.cli.target import on_option, target_of, usable_run
from tunesmith.core import formats
from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import known_mirrors
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import Cause
from tunesmith.plan import build, start
from tunesmith.plan.gpus import gpus_of
from tunesmith.plan.options import TrainOptions, number_of, words_of
from tunesmith.plan.plan import Plan
from tunesmith.plan.target import ModelReceiver, Resumable, Target
from tunesmith.project import Project
from tunesmith.targets.capability import require


@dataclass(frozen=True)
class Choices:
    """How a verb is to be done: `dry` shows, `attach` follows, `from_laptop` is the folder of
    a base model to upload."""

    dry: bool = False
    attach: bool = True
    from_laptop: str = ""


def options_of(
    *,
    config: str,
    overrides: list[str] | None = None,
    prompts: str = "",
    evaluate: bool = True,
    run: str = "",
    revision: str = "",
    mirror: str = "",
    queue: bool = False,
    then: str = "",
    price: str = "",
    max_hours: str = "",
    max_cost: str = "",
    preset: str = "",
    gpus: str = "",
    keep_batch: bool = False,
) -> TrainOptions:
    """Return the options of a training from the words of `train`, by the names of its options."""
    return TrainOptions(
        config=Path(config),
        overrides=tuple(overrides or ()),
        prompts=Path(prompts) if prompts else None,
        evaluate=evaluate,
        run_id=run or None,
        revision=revision or None,
        mirror=mirror or None,
        queue=queue,
        then=words_of(then),
        price=number_of("price", price.removesuffix("/h")),
        max_hours=number_of("max-hours", max_hours),
        max_cost=number_of("max-cost", max_cost),
        preset=preset or None,
        gpus=gpus_of(gpus),
        keep_batch=keep_batch,
    )


def train(root: Path, on: str, options: TrainOptions, choices: Choices) -> str | None:
    """Train, follow, and do what was asked to follow; return the run id."""
    project = Project.at(root)
    target = target_of(project, on)
    if choices.from_laptop:
        require(target, ModelReceiver)
    check_after(target, options.then)
    plan = build.plan_training(project, target, options)
    return train_planned(project, target, plan, options, choices)


def train_planned(
    project: Project, target: Target, plan: Plan, options: TrainOptions, choices: Choices
) -> str | None:
    """Fetch the base model, start the planned training, follow it; return the run id."""
    if choices.dry:
        say(plan.render())
        if choices.from_laptop:
            say(f"before that the base model goes to {target.name} from {choices.from_laptop}")
        return None
    # What can be wrong was found before anything is fetched or uploaded.
    _tell_data(project, plan)
    if choices.from_laptop:
        name = str(plan.request.needed_model().name)
        require(target, ModelReceiver).send_model(name, project.find(choices.from_laptop))
    if "fetch" not in plan.phases:
        plan = with_base_model(project, plan, options.mirror or "default", options.revision)
    _tell_decisions(options, plan)
    run_id = start.start_training(target, plan)
    say(f"run {run_id}" + (f" on {target.name}" if target.shared else ""))
    if not choices.attach:
        say(f"started; `inv attach{on_option(target)} --run {run_id}` follows it")
        return run_id
    finish(project, target, run_id)
    return run_id


def resume(
    root: Path,
    on: str,
    run: str | None,
    *,
    mirror: str | None = None,
    max_hours: float | None = None,
    cause: Cause = "resume",
    dry: bool,
) -> None:
    """Continue a run's unfinished phases and follow them.

    Without a run, on a host: what a rebuild has taken is brought back, and every run that a
    restart has cut off goes on, one after the other; the first is followed. `max_hours`
    takes the place of the run's own limit.
    """
    project = Project.at(root)
    target = target_of(project, on)
    if run is None and isinstance(target, Resumable) and not dry:
        _heal(project, target, mirror)
        target.renew_autostart()
        started, refused = target.resume_all()
        for why in refused:
            say(why)
        for run_id in started:
            say(f"run {run_id}: continues")
        if started:
            finish(project, target, started[0])
            return
    run_id = usable_run(project, target, run, dry=dry)
    status = target.status(run_id)
    left = [phase for phase, state in status.phases.items() if state != "succeeded"]
    if status.state == "succeeded":
        raise UsageError(f"run {run_id} has succeeded; there is nothing to continue")
    if dry:
        say(f"would continue run {run_id} with {', '.join(left) or 'its first phase'}")
        return
    if max_hours is not None:
        start.set_limit(target, run_id, max_hours)
    offset = target.events(run_id, 0)[1]
    target.start(run_id, left if set(left) & {"merge", "proof", "predict"} else (), cause)
    say(f"run {run_id}")
    finish(project, target, run_id, offset)


def _heal(project: Project, target: Target, mirror: str | None) -> None:
    """Bring a host to the state it was provisioned for; one that is there costs one look."""
    from tunesmith.cli import provisioning

    was = require(target, Resumable).provisioning()
    name = mirror or was.mirror
    if mirror is None and name not in known_mirrors(project.mirrors):
        say(
            f"{target.name} was provisioned with a mirror file of your own; with --mirror FILE "
            "what a rebuild has taken is brought back too"
        )
        return
    provisioning.provision(
        project.root, target.name, mirror=name, flavour=was.flavour, toolkit=was.toolkit
    )


def attach(root: Path, on: str, run: str | None) -> None:
    """Follow a run to its end, and do what was asked to follow."""
    project = Project.at(root)
    target = target_of(project, on)
    # The newest has to be asked for; a name is believed, so that its state shows at once.
    finish(project, target, RunId(run) if run else target.find(None))


def stop(root: Path, on: str, run: str | None) -> None:
    """Ask for a checkpoint and an end, and wait for it."""
    target = target_of(Project.at(root), on)
    run_id = target.find(run)
    target.stop(run_id)
    say(f"run {run_id}: stopping after a checkpoint")
    status = target.status(run_id)
    for update in target.watch(run_id, target.events(run_id, 0)[1]):
        status = update.status
    say(f"run {run_id}: {status.state} at step {status.step}; {status.message}")


def _tell_data(project: Project, plan: Plan) -> None:
    for found in plan.request.data:
        # Without rows the file is none of ours: a hub's address.
        if found.rows is None:
            say(f"data set: {found.key} from {found.file} (not checked)")
            continue
        file = build.shown(project, Path(found.file))
        rows, warnings = formats.count(found.rows), found.figures["warnings"]
        say(f"data set: {found.key} from {file} ({rows} rows checked, {warnings} warnings)")
    for line in plan.rows:
        say(line)


def _tell_decisions(options: TrainOptions, plan: Plan) -> None:
    template = plan.request.overrides.get("template")
    if template and not any(w.startswith("template=") for w in options.overrides):
        say(f"template: {template} (that of {plan.request.needed_model().name})")
    for item in plan.managed:
        if item.was not in (None, item.value) and item.key not in (
            "model_name_or_path",
            "output_dir",
        ):
            say(f"{item.key}: {item.was} -> {item.value} ({item.why})")
