"""Numbered tasks, done by processes forked from this one.

Threads of one Python take turns between short operations: two of them merge hardly faster than
one. A forked process already has everything loaded before the fork, and shares that memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from tunesmith.core.errors import TunesmithError
from tunesmith.job.system import resources

Do = Callable[[int], Any]  # does the task with this number; its result is pickled


class Result(NamedTuple):
    """A worker's result of one task: a value, or an error with its traceback as text."""

    task: int
    value: Any = None
    error: Exception | None = None
    trace: str = ""


# More of them would wait for the disk and for memory bandwidth.
MOST = 4
# Tasks queued per process, so that it never waits for the next one.
_AHEAD = 2


def fitting() -> int:
    """Return the number of processes that merge fastest on this machine."""
    return min(MOST, resources.cpu_count())


class WorkerPool:
    """Forked worker processes, as a context manager that ends them; one worker: no fork.

    Enter it before this process starts threads: a fork does not copy them.
    """

    def __init__(self, do: Do, workers: int) -> None:
        self._do = do
        # On other systems than Linux libraries do not survive a fork.
        self._workers = workers if workers > 1 and sys.platform == "linux" else 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> WorkerPool:
        context = multiprocessing.get_context("fork")
        try:
            for _ in range(self._workers):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(
                    target=_work, args=(self._do, theirs, os.getpid()), daemon=True
                )
                process.start()
                self._processes.append(process)
                theirs.close()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def each(self, count: int) -> Iterator[tuple[int, Any]]:
        """Yield (number, result) of the tasks 0 to count - 1 as they end.

        They start in the order of their numbers. Raises the exception of a task, and
        TunesmithError if a worker died before its task ended.
        """
        numbers = iter(range(count))
        if not self._pipes:
            for number in numbers:
                yield number, self._do(number)
            return
        pending = dict.fromkeys(self._pipes, 0)
        for pipe in self._pipes * _AHEAD:
            self._give(pipe, numbers, pending)
        while busy := [pipe for pipe in self._pipes if pending[pipe]]:
            ready = set(wait(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                number, value = self._take(pipe)
                pending[pipe] -= 1
                self._give(pipe, numbers, pending)
                yield number, value

    def _give(
        self, pipe: Connection, numbers: Iterator[int], pending: dict[Connection, int]
    ) -> None:
        number = next(numbers, None)
        if number is not None:
            try:
                pipe.send(number)
            except BrokenPipeError:
                raise self._ended(pipe) from None
            pending[pipe] += 1

    def _take(self, pipe: Connection) -> tuple[int, Any]:
        try:
            result: Result = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._ended(pipe) from None
        if result.error is not None:
            raise result.error from RuntimeError(result.trace)
        return result.task, result.value

    def _ended(self, pipe: Connection) -> TunesmithError:
        process = self._processes[self._pipes.index(pipe)]
        process.join()
        return TunesmithError(
            f"a process of the merge ended with exit code {process.exitcode} (-9: killed, e.g. "
            "because memory ran out): merge again"
        )


def _work(do: Do, pipe: Connection, parent: int) -> None:
    """Do the tasks whose numbers arrive through the pipe, until it is closed."""
    from tunesmith.job.run.process import die_with_parent

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not die_with_parent(str(parent)):
        return
    while True:
        number = pipe.recv()
        try:
            result = Result(number, do(number))
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            result = Result(number, error=error, trace=traceback.format_exc())
        pipe.send(result)
