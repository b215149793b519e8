"""Trainings of a container: `train` goes on with the run that the same words have begun.

A container says its words again whenever its engine starts it, and ends with its first process.
So there is no host to name, nothing to detach from and nothing to queue behind.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.cli import run as clone
from tunesmith.cli.command import Session, command
from tunesmith.cli.container_checks import check_shm, find_config, prepare, say_device
from tunesmith.cli.options import TRAIN_CONFIG

_TRAIN = (
    *("config", "prompts", "run", "revision", "mirror", "evaluate", "preset", "then"),
    *("gpus", "keep-batch", "price", "max-hours", "max-cost", "overrides"),
)


@command(
    example=clone.train.example,
    help={
        **{option: clone.train.texts[option] for option in _TRAIN},
        "new": "do not continue a stopped run",
    },
)
def train(
    session: Session,
    config: str = TRAIN_CONFIG,
    prompts: str = "",
    run: str = "",
    revision: str = "",
    mirror: str = "",
    evaluate: bool = True,
    preset: str = "",
    gpus: str = "",
    keep_batch: bool = False,
    then: str = "",
    price: str = "",
    max_hours: str = "",
    max_cost: str = "",
    new: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Train one config, measured before and after.

    A run of this config that was stopped is continued. Progress is shown until the end.
    """
    from tunesmith.cli import training
    from tunesmith.cli.console import say
    from tunesmith.cli.container_runs import unfinished_run
    from tunesmith.cli.target import target_of
    from tunesmith.plan import build

    prepare()
    options = training.options_of(
        config=str(find_config(Path(config))),
        overrides=overrides,
        prompts=str(find_config(Path(prompts))) if prompts else "",
        evaluate=evaluate,
        run=run,
        revision=revision,
        mirror=mirror,
        then=then,
        price=price,
        max_hours=max_hours,
        max_cost=max_cost,
        preset=preset,
        gpus=gpus,
        keep_batch=keep_batch,
    )
    project = session.project
    target = target_of(project, "local")
    # Planned once, to be compared with the runs there are and to be started.
    plan = build.plan_training(project, target, options)
    check_shm(plan.config or {})
    say_device()
    unfinished = None if new else unfinished_run(target, plan, options.run_id)
    if unfinished is None:
        choices = training.Choices(dry=session.dry)
        training.train_planned(project, target, plan, options, choices)
        return
    say(f"run {unfinished} of this config was not finished (--new starts another)")
    _continue(session, unfinished, mirror, max_hours)


@command(
    example="inv resume --run RUN_ID",
    help={option: clone.resume.texts[option] for option in ("run", "mirror", "max-hours")},
)
def resume(session: Session, run: str = "", mirror: str = "", max_hours: str = "") -> None:
    """Continue a stopped or failed run."""
    from tunesmith.job.run.listing import find

    prepare()
    say_device()
    found = find(session.project.runs, run or None)
    _continue(session, found.run_id, mirror, max_hours)


def _continue(session: Session, run_id: str, mirror: str, max_hours: str) -> None:
    from tunesmith.cli import training
    from tunesmith.cli.container_runs import cause_of
    from tunesmith.job.run.folder import RunFolder
    from tunesmith.plan.options import number_of

    training.resume(
        session.root,
        "local",
        run_id,
        mirror=mirror or None,
        max_hours=number_of("max-hours", max_hours),
        cause=cause_of(RunFolder(session.project.run_folder(run_id)), "resume"),
        dry=session.dry,
    )
