"""Processes found by an argument of theirs, and their end. Linux and macOS."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")


def with_argument(text: str) -> tuple[int, ...]:
    """Return the ids of the processes, ours excepted, that have `text` in their command."""
    return tuple(pid for pid, command in _commands() if text in command and pid != os.getpid())


def resident_bytes(pid: int) -> int:
    """Return the memory a process has in use; 0 when it is gone, or the system does not tell."""
    try:
        pages = (_PROC / str(pid) / "statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def end_all(pids: Iterable[int], *, grace: float) -> None:
    """Ask processes to end, and kill those that are left after `grace` seconds in all.

    One after the other, the oldest first: a parent gets the time to end its children, which
    may clear up when it asks them.
    """
    deadline = time.monotonic() + grace
    for pid in sorted(pids):
        there = _signal(pid, signal.SIGTERM)
        while there and time.monotonic() < deadline:
            time.sleep(0.05)
            there = _signal(pid, 0)
        if there:
            _signal(pid, signal.SIGKILL)


def _commands() -> Iterable[tuple[int, str]]:
    if (_PROC / "self" / "cmdline").exists():
        for folder in _PROC.glob("[0-9]*"):
            # A process that ended meanwhile, or is another user's.
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                yield int(folder.name), command.replace("\0", " ")
        return
    argv = ["ps", "-axww", "-o", "pid=,command="]
    for line in subprocess.run(
        argv, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        yield int(pid), command


def _signal(pid: int, number: int) -> bool:
    """Send a signal (0: none, only look); False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
