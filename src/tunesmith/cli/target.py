"""What the verbs know of the target that `--on` names."""

from __future__ import annotations

from tunesmith.cli.base_model import fetch_base_model
from tunesmith.cli.console import moving, say
from tunesmith.core.errors import UsageError
from tunesmith.plan.target import Target
from tunesmith.project import Project
from tunesmith.targets import adoption, factory
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget


def target_of(project: Project, on: str) -> Target:
    return factory.target_of(project, on, say, moving)


def usable_run(project: Project, target: Target, run: str | None, *, dry: bool) -> str:
    """Return the id of a run to work with; one pulled from a host gets its base model here."""
    run_id = target.find(run)
    if isinstance(target, LocalTarget) and not dry:
        adoption.settle(
            project, run_id, lambda name: fetch_base_model(project, name, "default", None)
        )
    return run_id


def require_host(target: Target) -> HostTarget:
    if not isinstance(target, HostTarget):
        raise UsageError(
            f"--on {target.name}: this is for hosts",
            hint="`inv host.list` shows the known hosts",
        )
    return target


def on_option(target: Target) -> str:
    """Return the option that names a target, empty for the default one."""
    return "" if target.name == "local" else f" --on {target.name}"


def path_prefix(target: Target) -> str:
    """Return what goes before a path of a target, empty for one of this machine."""
    return f"{target.name}:" if target.shared else ""
