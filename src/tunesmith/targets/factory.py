"""The target that `--on` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunesmith.core.callbacks import Bar, OnText, unseen
from tunesmith.core.errors import UsageError
from tunesmith.hosts import inventory
from tunesmith.plan.target import Target
from tunesmith.project import Project
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget


def _container(project: Project, tell: OnText) -> Target:
    # Here: the image, which plans with this module, has no Docker SDK.
    from tunesmith.targets.container import ContainerTarget

    return ContainerTarget(project, tell)


# What `--on` names besides the hosts of the inventory: no host can have such a name.
TARGETS: Mapping[str, Callable[[Project, OnText], Target]] = {
    "local": lambda project, _tell: LocalTarget(project),
    "container": _container,
}


def target_of(
    project: Project,
    name: str,
    tell: OnText,
    bar: Bar = unseen,
) -> Target:
    """Return the target `--on` names; `tell` hears of uploads and downloads, `bar` shows long ones.

    Raises UsageError for one that does not exist.
    """
    if name in TARGETS:
        return TARGETS[name](project, tell)
    if "," in name:
        raise UsageError(
            f"--on {name}: only one target at a time", hint="`inv host.list` shows the hosts"
        )
    known = inventory.read(project.inventory)
    if name in known:
        return HostTarget(project, name, tell, bar)
    raise UsageError(
        f"unknown target {name!r}; known are: {', '.join([*TARGETS, *known])}",
        hint='`inv host.add NAME "ssh ..."` adds a host',
    )


def check_host_name(name: str) -> None:
    """Raise UsageError for a host's name that `--on` has another meaning for."""
    if name in TARGETS:
        raise UsageError(f"{name!r} is a target of its own", hint="call the host gpu1, for example")
