"""One worker process, from start to end, as seen by the supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core import isolated
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.process import SUPERVISOR_PID, WORKER_OF
from tunesmith.job.run.schema import Heartbeat
from tunesmith.job.run.stored import DamagedError, read_record
from tunesmith.job.system import disk, processes, resources

_WORKER = "tunesmith.job.supervisor.worker"
_LOG_TAIL_BYTES = 16_384
# Then it hangs in the kernel, and nothing ends it.
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Ended:
    """How a worker ended. `code` is negative for a signal, as in subprocess."""

    code: int
    stalled: bool
    oom_killed: bool
    log_tail: str


class Attempt:
    """A running worker. Its stdout and stderr are appended to train.log."""

    def __init__(
        self,
        run: RunFolder,
        phase: str,
        environment: dict[str, str],
        locks: Sequence[int],
        workplace: Path,
    ) -> None:
        """Start it. Raises OSError if the run's disk cannot even store a log."""
        self._run = run
        self._log_offset = run.log_file.stat().st_size if run.log_file.exists() else 0
        self._oom_kills = resources.oom_kills()
        with run.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                isolated.argv(
                    sys.executable, _WORKER, str(run.path), phase, options=isolated.UNBUFFERED
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=workplace,
                env={
                    **environment,
                    SUPERVISOR_PID: str(os.getpid()),
                    WORKER_OF: str(run.path),
                },
                # Its own session and group: Ctrl-C in a terminal reaches only the supervisor,
                # and a signal to the group also reaches the worker's children.
                start_new_session=True,
                # The worker keeps the locks of run and queue if the supervisor is killed.
                pass_fds=tuple(locks),
            )
        self._last_sign = time.monotonic()
        self._last_step: int | None = None
        self._first: tuple[float, int] | None = None
        self._stalled = False
        self._in_file: Heartbeat | None = None
        self.heartbeat: Heartbeat | None = None

    def poll(self) -> Ended | None:
        """Return how the worker ended, or None while it runs."""
        code = self._process.poll()
        if code is None:
            self._read_heartbeat()
            return None
        # Children that outlive their worker would hold the GPU's memory.
        self.kill()
        oom_killed = resources.oom_kills() > self._oom_kills
        return Ended(code, self._stalled, oom_killed, self.log_tail())

    def request_stop(self) -> None:
        """Ask for a checkpoint and an end.

        The worker alone: its loaders of data would die of it, and it passes it on to ranks.
        """
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the worker and all that it has started at once, ranks in sessions of their own
        among them."""
        self._signal_group(signal.SIGKILL)
        end_workers(self._run)

    def sign(self) -> None:
        """Record a sign of life from the worker."""
        self._last_sign = time.monotonic()

    def silent_seconds(self) -> float:
        """Return the seconds since the last step (without pauses for disk space)."""
        return time.monotonic() - self._last_sign

    def mark_stalled(self, dump_seconds: float) -> None:
        """Write the stacks of all threads to train.log, then end the worker."""
        self._stalled = True
        # SIGCONT first: a stopped process could not write its stacks.
        self._signal_group(signal.SIGCONT)
        mine = processes.marked(WORKER_OF, str(self._run.path))
        processes.tell(mine, signal.SIGCONT)
        self._process.send_signal(signal.SIGUSR1)
        processes.tell([one for one in mine if one.rank is not None], signal.SIGUSR1)
        time.sleep(dump_seconds)
        self.kill()

    def eta_seconds(self) -> float | None:
        """Return the estimated seconds left, from this attempt's steps only."""
        beat = self.heartbeat
        if beat is None or self._first is None or not beat.total_steps:
            return None
        done = beat.step - self._first[1]
        if done <= 0:
            return None
        pace = (beat.time - self._first[0]) / done
        return round(max(0.0, (beat.total_steps - beat.step) * pace), 1)

    def log_tail(self) -> str:
        """Return the end of this worker's part of train.log."""
        try:
            with self._run.log_file.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_offset, size - _LOG_TAIL_BYTES))
                return log.read().decode("utf-8", "replace")
        except OSError as error:
            if not disk.refused(error):
                raise
            return ""

    def hear(self, heartbeat: Heartbeat) -> None:
        """Use the newest heartbeat: from the file, or one sent because the disk refused it."""
        if heartbeat.step != self._last_step or heartbeat.paused:
            self._last_sign = time.monotonic()
            self._last_step = heartbeat.step
        if self._first is None and heartbeat.step_seconds is not None:
            self._first = (heartbeat.time, heartbeat.step)
        self.heartbeat = heartbeat

    def _read_heartbeat(self) -> None:
        try:
            heartbeat = read_record(self._run.heartbeat_file, Heartbeat, "")
        except (FileNotFoundError, DamagedError):
            return  # the next one follows within a second of a step
        except OSError as error:
            if not disk.refused(error):
                raise
            return
        # The file may be older than the last heartbeat that was sent.
        if heartbeat != self._in_file:
            self._in_file = heartbeat
            self.hear(heartbeat)

    def _signal_group(self, signum: int) -> None:
        try:
            os.killpg(self._process.pid, signum)
        except ProcessLookupError:
            return  # it is gone: nothing to signal


def end_workers(run: RunFolder) -> None:
    """End what is left of a run's workers; whoever calls has the run's lock.

    A rank holds no lock: one whose agent was killed may be left behind, hanging in a
    collective, with the memory of its GPU.
    """
    processes.end(WORKER_OF, str(run.path), _END_SECONDS)
