"""Who a process is, beyond its pid.

A pid alone lies: after a restart the same number may belong to somebody else, and a
container restart does not change the host's boot id. A process is therefore named by
its pid and its start time, and a container's life by the start time of its PID 1.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from dataclasses import asdict, dataclass
from typing import Any

from tunesmith.job.system.processes import stat_fields

SUPERVISOR_PID = "TUNESMITH_SUPERVISOR_PID"
# The folder of a run, in the environment of its worker and of all that this starts.
WORKER_OF = "TUNESMITH_WORKER_OF"


@dataclass(frozen=True)
class Identity:
    """A process that can be told from a later one with the same pid.

    `started` and `init_started` are in clock ticks since the machine's boot, field 22
    of /proc/<pid>/stat (proc(5)).
    """

    pid: int
    started: int
    init_started: int
    hostname: str

    def alive(self) -> bool:
        """Whether this very process still runs in this container or machine."""
        if self.hostname != socket.gethostname() or self.init_started != start_ticks(1):
            return False
        return start_ticks(self.pid) == self.started

    def restarted(self) -> bool:
        """Whether it worked in this very container, which was started again since."""
        return self.hostname == socket.gethostname() and self.init_started != (start_ticks(1) or 0)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Identity:
        """Read what `to_json` wrote. Raises KeyError or TypeError on anything else."""
        return cls(
            pid=int(value["pid"]),
            started=int(value["started"]),
            init_started=int(value["init_started"]),
            hostname=str(value["hostname"]),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.hostname}"


def start_ticks(pid: int) -> int | None:
    """Return when `pid` started, in ticks since boot; None when there is no such process.

    A zombie is not a running process: it holds a pid, but does nothing any more.
    """
    try:
        fields = stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] == "Z":
        return None
    return int(fields[19])


def identify(pid: int | None = None) -> Identity:
    """Return the identity of `pid` (default: this process). Raises ProcessLookupError."""
    pid = os.getpid() if pid is None else pid
    started, init_started = start_ticks(pid), start_ticks(1)
    if started is None:
        raise ProcessLookupError(pid)
    return Identity(pid, started, init_started or 0, socket.gethostname())


def is_first_rank() -> bool:
    """Return whether this process speaks for a training: the only one, or torchrun's rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_count() -> int:
    """Return how many processes torchrun started for this training; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def die_with_parent(supervisor: str | None) -> bool:
    """Ask for SIGTERM when the parent dies: checkpoint and stop, never train alone.

    Returns False when the supervisor (its pid, as text) is gone already: a process that
    was orphaned before it could ask would never be told. prctl(2), PR_SET_PDEATHSIG = 1;
    the setting outlives execve, so it reaches torchrun, whose ranks have it as parent.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    return "RANK" in os.environ or supervisor in (None, str(os.getppid()))
