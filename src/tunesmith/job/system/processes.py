"""Processes found by a mark in the environment that they were started with.

A process group does not hold what torchrun starts: each rank gets a session of its own. The
environment is inherited by all of them, and by what they start, and cannot be lost when a
process in between dies (proc(5), /proc/PID/environ).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Marked:
    """A live process that carries a mark, its parent, and its rank where torchrun gave one."""

    pid: int
    parent: int
    rank: int | None


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat (proc(5)) from the third, the state, on.

    Raises OSError when the process has gone.
    """
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    # The command name stands in parentheses and may hold spaces and parentheses itself.
    return text.rpartition(")")[2].split()


def marked(name: str, value: str) -> list[Marked]:
    """Return the live processes whose environment has `name` with this value, by pid."""
    mark = os.fsencode(f"{name}={value}")
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            fields = stat_fields(int(folder.name))
        except OSError:
            continue  # it has ended, or belongs to another user
        if mark in variables and fields[0] != "Z":
            found.append(Marked(int(folder.name), int(fields[1]), _rank(variables)))
    return sorted(found, key=lambda process: process.pid)


def _rank(variables: list[bytes]) -> int | None:
    ranks = [word[5:] for word in variables if word.startswith(b"RANK=")]
    return int(ranks[0]) if ranks and ranks[0].isdigit() else None


def tell(processes: list[Marked], number: signal.Signals) -> None:
    """Send a signal to processes; what has ended meanwhile needs none."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def end(name: str, value: str, seconds: float) -> list[Marked]:
    """Kill every process with the mark, also those that appear meanwhile.

    Returns what is still there after `seconds`: a process that hangs in the kernel.
    """
    deadline = time.monotonic() + seconds
    while left := [one for one in marked(name, value) if one.pid != os.getpid()]:
        if time.monotonic() > deadline:
            break
        tell(left, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    return left
