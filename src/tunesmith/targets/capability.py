"""A target as one that can do more than run jobs, or the reason why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from tunesmith.core.errors import UsageError
from tunesmith.plan.target import (
    ModelReceiver,
    PowerControl,
    PullDestination,
    PullSource,
    Resumable,
    Target,
)
from tunesmith.services.service import Services

Capability = TypeVar("Capability")

# By capability: what a target without it cannot do (after its name), and what to do instead.
_LACKING: Mapping[type, tuple[str, str]] = {
    PullSource: (
        "keeps its runs; there is nothing to pull",
        "pull from a host, as in `--on gpu1`; `inv host.list` shows them",
    ),
    PullDestination: ("takes no pulled run", "use the run on this machine: `--on local`"),
    PowerControl: (
        "has no power switch",
        "leave `poweroff` out of --then; only a host can be powered off",
    ),
    ModelReceiver: (
        "takes no base model from this machine",
        "leave out --from-laptop; only a host needs an upload",
    ),
    Resumable: (
        "does not resume runs by itself",
        "continue a run with `inv resume`; only a host restarts its runs",
    ),
    Services: (
        "runs no web services of ours",
        "use `--on local` or a host; the image's own are started with "
        "`docker compose -f docker/compose.yaml up webui` (or api)",
    ),
}


def require(target: Target, capability: type[Capability]) -> Capability:
    """Return the target as one that has a capability. Raises UsageError when it has not."""
    if isinstance(target, capability):
        return target
    lacks, hint = _LACKING[capability]
    raise UsageError(f"{target.name} {lacks}", hint=hint)
