"""The target that `--on` names."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.core.errors import UsageError
from tunesmith.hosts import inventory, transfer
from tunesmith.plan.target import Target
from tunesmith.project import Project
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget


def target_of(
    project: Project,
    name: str,
    tell: Callable[[str], None],
    bar: transfer.Bar = transfer.unseen,
) -> Target:
    """Return the target `--on` names; `tell` hears of uploads and downloads, `bar` shows long ones.

    Raises UsageError for one that does not exist.
    """
    if name == "local":
        return LocalTarget(project)
    if name == "container":
        # Here: the image, which plans with this module, has no Docker SDK.
        from tunesmith.targets.container import ContainerTarget

        return ContainerTarget(project, tell)
    known = inventory.read(project.inventory)
    if name in known:
        return HostTarget(project, name, tell, bar)
    raise UsageError(
        f"unknown target {name!r}; known are: {', '.join([*inventory.TARGETS, *known])}; "
        '`inv host.add NAME "ssh ..."` adds a host'
    )
