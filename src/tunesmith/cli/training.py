"""Train, resume, follow and stop a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cli.base_model import fetch_base_model
from tunesmith.cli.console import say
from tunesmith.cli.outcome import check_after, finish
from tunesmith.cli.target import on_option, require_host, target_of, usable_run
from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import known_mirrors
from tunesmith.job.run.records import Cause
from tunesmith.job.run.run_id import RunId
from tunesmith.plan import build
from tunesmith.plan.config import Config
from tunesmith.plan.plan import Plan
from tunesmith.project import Project
from tunesmith.targets.host import HostTarget


@dataclass(frozen=True)
class Choices:
    """How a verb is to be done: `dry` shows, `attach` follows, `from_laptop` is the folder of
    a base model to upload."""

    dry: bool = False
    attach: bool = True
    from_laptop: str = ""


def train(root: Path, on: str, asked: build.Asked, choices: Choices) -> str | None:
    """Train, follow, and do what was asked to follow; return the run id."""
    project = Project.at(root)
    target = target_of(project, on)
    if choices.from_laptop:
        require_host(target)
    if choices.dry:
        say(build.plan_training(project, target, asked, None).render())
        if choices.from_laptop:
            say(f"before that the base model goes to {target.name} from {choices.from_laptop}")
        return None
    # What can be wrong is found before anything is fetched or uploaded.
    config = build.read_config(project, asked.config, asked.overrides)
    _tell_data(project, build.plan_training(project, target, asked, None))
    name = str(config.get("model_name_or_path"))
    check_after(target, asked.then)
    if choices.from_laptop:
        require_host(target).send_model(name, project.find(choices.from_laptop))
    fetched_there = target.fetch_order(name, asked.revision, asked.mirror) is not None
    mirror = asked.mirror or "default"
    code = bool(config.overrides.get("trust_remote_code"))
    model = (
        None
        if fetched_there
        else fetch_base_model(project, name, mirror, asked.revision, code=code)
    )
    plan = build.plan_training(project, target, asked, model)
    _tell_decisions(config, asked, plan)
    run_id = build.start_training(project, target, plan)
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
    if run is None and isinstance(target, HostTarget) and not dry:
        _heal(root, target, mirror)
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
    left = [phase for phase, state in status["phases"].items() if state != "succeeded"]
    if status["state"] == "succeeded":
        raise UsageError(f"run {run_id} has succeeded; there is nothing to continue")
    if dry:
        say(f"would continue run {run_id} with {', '.join(left) or 'its first phase'}")
        return
    if max_hours is not None:
        build.set_limit(target, run_id, max_hours)
    offset = target.events(run_id, 0)[1]
    target.start(run_id, left if set(left) & {"merge", "proof", "predict"} else (), cause)
    say(f"run {run_id}")
    finish(project, target, run_id, offset)


def _heal(root: Path, target: HostTarget, mirror: str | None) -> None:
    """Bring a host to the state it was provisioned for; one that is there costs one look."""
    from tunesmith.cli import provisioning

    asked = target.layout.asked
    flavour = asked.get("flavour", "auto")
    name = mirror or asked.get("mirror", "default").partition(":")[0]
    if mirror is None and name not in known_mirrors(root / "configs" / "mirrors"):
        say(
            f"{target.name} was provisioned with a mirror file of your own; with --mirror FILE "
            "what a rebuild has taken is brought back too"
        )
        return
    provisioning.provision(
        root,
        target.name,
        mirror=name,
        flavour=None if flavour == "auto" else flavour,
        toolkit=asked.get("toolkit") == "yes",
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
    status: dict[str, Any] = {}
    for look in target.watch(run_id, target.events(run_id, 0)[1]):
        status = look.status
    say(f"run {run_id}: {status['state']} at step {status.get('step')}; {status['message']}")


def _tell_data(project: Project, plan: Plan) -> None:
    for found in plan.request["data"]:
        # Without rows the file is none of ours: a hub's address.
        if found["rows"] is None:
            say(f"data set: {found['key']} from {found['file']} (not checked)")
            continue
        file = build.shown(project, Path(found["file"]))
        rows, warnings = found["rows"], found["warnings"]
        say(f"data set: {found['key']} from {file} ({rows} rows checked, {warnings} warnings)")


def _tell_decisions(config: Config, asked: build.Asked, plan: Plan) -> None:
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
