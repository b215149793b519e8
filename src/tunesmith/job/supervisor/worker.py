"""One phase of one run in one process: `python -m tunesmith.job.supervisor.worker RUN PHASE`.

The supervisor starts it. It ends in one of three ways: exit code 0 with a `summary` event,
STOPPED after a requested checkpoint, or FAILED with a `failure` event. Any other end is a crash,
which the supervisor classifies.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import write_json
from tunesmith.job.patches import imports
from tunesmith.job.run import streams
from tunesmith.job.run.adjustments import refusal
from tunesmith.job.run.exit_codes import FAILED, STOPPED
from tunesmith.job.run.failures import JobError, classify_text
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.journal import Reporter, SilentReporter
from tunesmith.job.run.process import SUPERVISOR_PID, die_with_parent, is_first_rank, rank_count
from tunesmith.job.supervisor import ranks
from tunesmith.job.system import disk
from tunesmith.job.system.resources import peak_memory

Run = Callable[..., dict[str, Any]]

_PHASES: dict[str, tuple[str, dict[str, Any]]] = {
    "check": ("tunesmith.job.training.config_check", {}),
    "fetch": ("tunesmith.job.training.fetch", {}),
    "before": ("tunesmith.job.evaluation.phase", {"phase": "before"}),
    "train": ("tunesmith.job.training.phase", {}),
    "after": ("tunesmith.job.evaluation.phase", {"phase": "after"}),
    "merge": ("tunesmith.job.merge.phase", {}),
    "proof": ("tunesmith.job.proof.phase", {}),
    "predict": ("tunesmith.job.evaluation.predict", {}),
}
# What begins with LLaMA-Factory's parser (job/training/config_check.py); train asks it itself.
_ASKED_FIRST = ("before", "predict")
# The proof is left out: it checks us, so it takes the libraries as they come.
_ASK_THE_MODEL = ("before", "after", "predict")


def main(argv: list[str]) -> int:
    """Run one phase and return its exit code."""
    run, phase = RunFolder(Path(argv[0])), argv[1]
    report = Reporter(run) if is_first_rank() else SilentReporter(run)
    if not die_with_parent(os.environ.get(SUPERVISOR_PID)):
        return STOPPED
    # For the class `stalled`: on this signal from the supervisor the stacks go to train.log.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    module, extra = _PHASES[phase]
    try:
        entry: Run = importlib.import_module(module).run
        if phase in _ASKED_FIRST:
            # Now: naming the device touches the GPU.
            importlib.import_module(_PHASES["check"][0]).beside(run.path, run.request())
        # Naming the device loads torch, which these have no need of; a merge does it elsewhere.
        if phase not in ("check", "fetch", "merge") and is_first_rank():
            from tunesmith.job.system.versions import versions

            write_json(run.path / "versions.json", versions())
        if phase in _ASK_THE_MODEL:
            imports.trim()
        summary = functools.partial(entry, run.path, run.request(), report, **extra)()
    except BaseException as error:  # noqa: BLE001 - every end of a worker is reported
        # SystemExit too: a library that leaves with 0 has not done the phase.
        return _report(run, report, phase, error)
    report("summary", phase=phase, **summary, peak_memory=peak_memory())
    return 0


def _report(run: RunFolder, report: Reporter, phase: str, error: BaseException) -> int:
    if type(error).__name__ == "Stopped":  # defined in callbacks, which imports transformers
        return STOPPED
    trace = traceback.format_exc()
    print(trace, file=sys.stderr, flush=True)
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    text = f"{type(error).__name__}: {error}"
    retry = error.retry if isinstance(error, JobError) else None
    if isinstance(error, JobError):
        failure, message, detail = error.failure, error.line, list(error.detail)
    elif isinstance(error, UsageError):
        failure, message, detail = "config", error.line, list(error.detail)
    elif isinstance(error, TunesmithError):
        failure, message, detail = "code", error.line, list(error.detail)
    else:
        failure = _class_of(run, error, text)
        message, detail = text.splitlines()[0][:500], trace.splitlines()[-12:]
        # The disk may accept writes again: the supervisor waits for it.
        retry = True if failure in (disk.FULL, disk.READ_ONLY) else None
    if rank_count() > 1:
        # One of them is the cause; the process that started them finds out which.
        ranks.leave_word(ranks.RankFailure(failure, message, tuple(detail), retry, time.time()))
        return FAILED
    passing = {} if retry is None else {"retry": retry}
    report("failure", phase=phase, failure=failure, message=message, detail=detail, **passing)
    return FAILED


def _class_of(run: RunFolder, error: BaseException, text: str) -> str:
    if isinstance(error, MemoryError):
        return "host_oom"
    if failure := disk.fault(error):
        return failure
    failure = classify_text(text)
    if failure in ("code", disk.FULL) and (refused := refusal(run)) is not None:
        # Libraries hide the disk's error: "file write failed", "cannot be opened".
        failure = disk.fault(refused) or failure
    return failure


def leave(ended: list[int]) -> None:
    """Exit now with the code in `ended`, if the phase has ended.

    The interpreter would free torch and a model piece by piece, which takes seconds, while the
    kernel frees the memory at once.
    """
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


if __name__ == "__main__":
    streams.outlive_disk()
    codes: list[int] = []
    # Handlers run in reverse order: those registered later come first.
    atexit.register(leave, codes)
    codes.append(main(sys.argv[1:]))
    sys.exit(codes[0])
