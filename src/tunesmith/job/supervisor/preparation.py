"""Requirements for starting a worker: disk space, time, a checkpoint, an environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tunesmith.core import formats, isolated
from tunesmith.core.errors import UsageError
from tunesmith.job.run import checkpoints
from tunesmith.job.run.adjustments import adjusted_config
from tunesmith.job.run.events import mend_events
from tunesmith.job.run.folder import RunFolder, claim_output
from tunesmith.job.run.journal import Journal
from tunesmith.job.run.schema import GpuChoice, RunRequest
from tunesmith.job.system import disk


def make_room(run: RunFolder, journal: Journal) -> None:
    """Reserve disk space for the status and events. Raises UsageError if the disk has none."""
    try:
        journal.open()
        mend_events(run.events_file)
    except OSError as error:
        if not disk.refused(error):
            raise
        raise UsageError(
            f"run {run.run_id} cannot start: {disk.describe(run.path, error)}, then "
            f"`inv resume --run {run.run_id}`"
        ) from None


def refuse_spent(run_id: str, worked: float, limit: float | None) -> None:
    """Raise UsageError if the run has worked (seconds) up to its limit."""
    if limit is not None and worked >= limit:
        raise UsageError(
            f"run {run_id} has worked {formats.duration(worked)}, and its max-hours is "
            f"{formats.duration(limit)}; "
            f"`inv resume --run {run_id} --max-hours N` gives it more"
        )


def newest_step(run: RunFolder, emit: Callable[..., None]) -> int:
    """Set faulty checkpoints aside; return the step that training continues from, or -1."""
    output = Path(adjusted_config(run)["output_dir"])
    claim_output(run, output)
    newest, discarded = checkpoints.newest_valid(output)
    for name, why in discarded:
        emit("discarded", checkpoint=name, why=why)
    return newest.step if newest else -1


def worker_environment(request: RunRequest) -> dict[str, str]:
    """Return the worker's environment variables: ours, the stack's, and the environment's PATH.

    PYTHONPATH and user site-packages are omitted unless the request sets them; even then they
    affect only programs that a worker starts, since the worker itself ignores them.
    """
    environment = isolated.variables(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    programs = str(Path(sys.executable).parent)
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    environment["PYTHONUNBUFFERED"] = "1"
    environment |= {key: str(value) for key, value in (request.env or {}).items()}
    if request.gpus is not None:
        environment |= _devices(request.gpus, environment.get("CUDA_VISIBLE_DEVICES"))
    return environment


def _devices(gpus: GpuChoice, visible: str | None) -> dict[str, str]:
    """Let the worker see the chosen GPUs alone, of those that are `visible` to us."""
    known = [word for word in (visible or "").split(",") if word]
    chosen = gpus.ids or tuple(range(gpus.count))
    # One that is not there is left out, and missed when torch counts them.
    seen = [known[number] for number in chosen if number < len(known)] if known else chosen
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, seen)), "NPROC_PER_NODE": str(gpus.count)}
