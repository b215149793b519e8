"""From a plan to a run that is under way on its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tunesmith.core import disk, formats
from tunesmith.core.errors import UsageError
from tunesmith.job.run.schema import Limits
from tunesmith.plan.options import run_limits
from tunesmith.plan.plan import Plan
from tunesmith.plan.target import Target


def start_training(target: Target, plan: Plan) -> str:
    """Create the plan's run and start it; return its id. Refuses a disk that is too small."""
    check_room(target, plan.needs)
    target.create(plan)
    try:
        target.start(plan.run_id, plan.phases, "user")
    except UsageError:
        # It was refused, so there is nothing in it yet.
        target.remove(plan.run_id)
        raise
    return plan.run_id


def start_on_run(target: Target, plan: Plan) -> str:
    """Start a plan's phases on the run it names, making the run if it is new."""
    check_room(target, plan.needs)
    if target.exists(plan.run_id):
        target.renew(plan)
    else:
        target.create(plan)
    target.start(plan.run_id, plan.phases, "user")
    return plan.run_id


def set_limit(target: Target, run_id: str, max_hours: float) -> None:
    """Let a run work for so many hours in all, those before included."""
    most = run_limits(max_hours=max_hours).max_seconds
    request = target.request(run_id)
    limits = replace(request.limits or Limits(), max_seconds=most)
    target.renew(Plan(target.location(run_id), (), replace(request, limits=limits)))


def check_room(target: Target, needs: Mapping[str, int]) -> None:
    """Refuse to start what the target's disk cannot hold, with the sum."""
    if not needs:
        return
    where, free = target.room()
    disk.require(
        where,
        sum(needs.values()),
        "this run",
        free=free,
        detail=[f"{formats.size(size):>9}  {what}" for what, size in needs.items()],
        hint="free space there, lower save_total_limit, or set TUNESMITH_HOME to a larger disk",
    )
