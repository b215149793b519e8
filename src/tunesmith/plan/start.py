"""From a plan to a run that is under way on its target."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.core import formats
from tunesmith.core.errors import UsageError
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
    limits = run_limits(max_hours=max_hours)
    request = target.request(run_id)
    request["limits"] = request.get("limits", {}) | limits
    target.renew(Plan(target.location(run_id), (), request))


def check_room(target: Target, needs: Mapping[str, int]) -> None:
    """Refuse to start what the target's disk cannot hold, with the sum."""
    if not needs:
        return
    where, free = target.room()
    total = sum(needs.values())
    if free < total:
        raise UsageError(
            f"{where}: {formats.size(free)} free, this run may need {formats.size(total)}",
            [f"{formats.size(size):>9}  {what}" for what, size in needs.items()],
            hint="free space, lower save_total_limit, or set TUNESMITH_HOME to a larger disk",
        )
