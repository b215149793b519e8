"""How a worker, a phase or a run ended, and the outcome of a worker's end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.job.run.events import Failure
from tunesmith.job.run.failures import CLASSES, classify_exit
from tunesmith.job.run.schema import State
from tunesmith.job.supervisor.attempt import Ended
from tunesmith.job.system import disk


@dataclass(frozen=True)
class Outcome:
    """How a worker, a phase or the run ended: succeeded, stopped, or failed with a class.

    `retry` overrides whether the class is retried.
    """

    state: State
    failure: str | None = None
    message: str = ""
    detail: tuple[str, ...] = ()
    retry: bool | None = None

    def may_pass(self) -> bool:
        """Whether the cause of a failure may disappear by itself."""
        if self.failure is None:
            return False
        return CLASSES[self.failure].retry if self.retry is None else self.retry


def reported(failure: Failure) -> Outcome:
    """Return the outcome in a worker's `failure` event."""
    return Outcome("failed", failure.failure, failure.message, failure.lines, failure.retry)


def refused(folder: Path, error: OSError) -> Outcome:
    """Return the outcome of work that the disk of `folder` refused; the cause may disappear."""
    return Outcome("failed", disk.fault(error), disk.describe(folder, error), retry=True)


def crashed(ended: Ended, folder: Path, trouble: OSError | None) -> Outcome:
    """Return the outcome of a worker that ended without reporting.

    `trouble` is the error that the disk of `folder` gives the supervisor itself: the reason if
    there is no better one.
    """
    failure, message = classify_exit(ended.code, ended.log_tail, oom_killed=ended.oom_killed)
    detail = tuple(ended.log_tail.splitlines()[-12:])
    if failure == "code" and trouble is not None:
        return replace(refused(folder, trouble), detail=detail)
    retry = True if failure in (disk.FULL, disk.READ_ONLY) else None
    return Outcome("failed", failure, message, detail, retry)
