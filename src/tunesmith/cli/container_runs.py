"""Which run the words of `train` mean in a container, and why work on it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.job.run.folder import RunFolder
    from tunesmith.job.run.schema import Cause, RunRequest, RunStatus
    from tunesmith.plan.plan import Plan
    from tunesmith.plan.target import Target


def unfinished_run(target: Target, plan: Plan, requested: str | None) -> str | None:
    """Return the run that the words of `train` mean to go on with, or None.

    `docker run` and a container that its engine starts again say the same words each time;
    `requested` is the run that they name.
    """
    wanted = identity(plan.request, plan.config or {})
    for run in reversed(target.runs()):
        run_id = run.run_id
        known = identity(target.request(run_id), target.config(run_id))
        if requested in (None, run_id) and known == wanted:
            # The newest of its kind decides: one that is through is not passed over.
            return run_id if may_continue(run) else None
    return None


def cause_of(run: RunFolder, usual: Cause) -> Cause:
    """Return why work on a run begins here: what is usual, unless the engine has started again
    the very container that worked on it."""
    status = run.last_status()
    worked = status.supervisor if status else None
    return "container" if worked and worked.restarted() else usual


def identity(request: RunRequest, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two runs of the same words have in common: models as they were named, and config.

    Where a model lies is known only once it is fetched.
    """
    named = tuple((origin.key, origin.place, origin.written) for origin in request.origins)
    own = {"output_dir", "model_name_or_path", *(key for key, _, _ in named)}
    model = request.model.name if request.model else None
    return model, named, {key: value for key, value in config.items() if key not in own}


def may_continue(status: RunStatus) -> bool:
    """Whether a run was stopped or killed in its training.

    One that failed by itself would fail again: that is for `resume`, when it was mended.
    """
    ended = status.state == "stopped" or status.failure == "killed"
    return ended and status.phases.get("train") != "succeeded"
