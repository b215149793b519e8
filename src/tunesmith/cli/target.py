"""What the verbs know of the target that `--on` names."""

from __future__ import annotations

from tunesmith.cli.base_model import fetch_base_model
from tunesmith.cli.console import moving, say
from tunesmith.plan.target import PullDestination, Target
from tunesmith.project import Project
from tunesmith.targets import factory


def target_of(project: Project, on: str) -> Target:
    return factory.target_of(project, on, say, moving)


def usable_run(project: Project, target: Target, run: str | None, *, dry: bool) -> str:
    """Return the id of a run to work with; one pulled from a host gets its base model here."""
    run_id = target.find(run)
    if isinstance(target, PullDestination) and not dry:
        target.adopt_pulled_run(
            run_id, lambda name: fetch_base_model(project, name, "default", None)
        )
    return run_id


def on_option(target: Target) -> str:
    """Return the option that names a target, empty for the default one."""
    return "" if target.name == "local" else f" --on {target.name}"


def path_prefix(target: Target) -> str:
    """Return what goes before a path of a target, empty for one of this machine."""
    return f"{target.name}:" if target.shared else ""
