"""Whose turn it is: of the runs in one folder one works at a time, in the order they came.

RUNS/.turn is held like a run's lock, by the supervisor and its worker. RUNS/.waiting/ has
one file for each run that waits, held by its supervisor: the kernel lets go of a dead one's,
so kill -9 leaves nobody waiting for a ghost. Every look and every change happens under one
short lock, so that of two that come at the same moment one is first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tunesmith.job.run.process import identify
from tunesmith.job.system import disk

_TURN = ".turn"
_WAITING = ".waiting"
_LOCK = "lock"


@dataclass(frozen=True)
class Slot:
    """The right to work in a folder of runs. `descriptor` is passed to the worker too."""

    descriptor: int

    def release(self) -> None:
        """Give it to the next (an exit does it too)."""
        os.close(self.descriptor)


def take(runs: Path, run_id: str) -> tuple[Slot | None, list[str]]:
    """Take the turn if nobody works or waits; else return None and who does, in order."""
    with _alone(runs):
        ahead = [*_working(runs), *_waiting(runs)]
        return (None, ahead) if ahead else (_taken(runs, run_id), [])


class QueueEntry:
    """A place in the queue, for a `with` block."""

    def __init__(self, runs: Path, run_id: str) -> None:
        self._runs = runs
        self._run_id = run_id
        folder = runs / _WAITING
        with _alone(runs):
            self._number = 1 + max((number for number, _ in _entries(folder)), default=0)
            self._file = folder / f"{self._number:09d}"
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            disk.label(self._descriptor, json.dumps({"run_id": run_id}))

    def __enter__(self) -> QueueEntry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _alone(self._runs):
            _drop(self._file)
        os.close(self._descriptor)

    def take(self) -> tuple[Slot | None, list[str]]:
        """Take the turn if it has come; else return None and who is ahead, in order."""
        with _alone(self._runs):
            ahead = [*_working(self._runs), *_waiting(self._runs, self._number)]
            return (None, ahead) if ahead else (_taken(self._runs, self._run_id), [])


@contextlib.contextmanager
def _alone(runs: Path) -> Iterator[None]:
    try:
        (runs / _WAITING).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not disk.refused(error):
            raise
    descriptor = _open(runs / _WAITING / _LOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _working(runs: Path) -> list[str]:
    """Return the run that has the turn: one id, or none."""
    descriptor = _open(runs / _TURN)
    try:
        return [_run_id(descriptor)] if _held(descriptor) else []
    finally:
        os.close(descriptor)


def _waiting(runs: Path, before: int | None = None) -> list[str]:
    """Return the runs that wait (with a number below `before`); drop those that died."""
    found = []
    for number, file in _entries(runs / _WAITING):
        if before is not None and number >= before:
            break
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if _held(descriptor):
                found.append(_run_id(descriptor))
            else:
                _drop(file)
        finally:
            os.close(descriptor)
    return found


def _entries(folder: Path) -> list[tuple[int, Path]]:
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(path.name), path) for path in names if path.name.isdigit())


def _taken(runs: Path, run_id: str) -> Slot:
    descriptor = _open(runs / _TURN)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    disk.label(descriptor, json.dumps({"run_id": run_id, **identify().to_json()}))
    return Slot(descriptor)


def _open(file: Path) -> int:
    """Open a lock file, made where there is none.

    On a disk that takes nothing the one that is there does as well; where there is none, nobody
    else can make one either, and a lock of our own (a file without a name) is as good as any.
    """
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        pass  # its folder could not be made either
    except OSError as error:
        if not disk.refused(error):
            raise
    try:
        return os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return os.memfd_create(file.name)


def _drop(entry: Path) -> None:
    """Delete an entry; on a disk that takes nothing it stays, and counts for nothing."""
    try:
        entry.unlink(missing_ok=True)
    except OSError as error:
        if not disk.refused(error):
            raise


def _held(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _run_id(descriptor: int) -> str:
    try:
        return str(json.loads(os.pread(descriptor, 4096, 0))["run_id"])
    except (ValueError, KeyError, TypeError):
        return "of an unknown name"  # a full disk: the lock counts, not its text
