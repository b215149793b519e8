"""Finding processes by an argument, and ending them. Linux and macOS."""

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
    """Return the ids of all other processes that have `text` in their command line."""
    return tuple(pid for pid, command in _commands() if text in command and pid != os.getpid())


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory; 0 if it has ended or the system does not report it."""
    try:
        pages = (_PROC / str(pid) / "statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def end_all(pids: Iterable[int], *, grace: float) -> None:
    """Terminate processes, and kill those that remain after `grace` seconds in total.

    One after the other, oldest first, so that a parent has time to end its children, which may
    clean up when it asks them to.
    """
    deadline = time.monotonic() + grace
    for pid in sorted(pids):
        alive = _signal(pid, signal.SIGTERM)
        while alive and time.monotonic() < deadline:
            time.sleep(0.05)
            alive = _signal(pid, 0)
        if alive:
            _signal(pid, signal.SIGKILL)


def _commands() -> Iterable[tuple[int, str]]:
    if (_PROC / "self" / "cmdline").exists():
        for folder in _PROC.glob("[0-9]*"):
            # The process may have ended, or belong to another user.
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
    """Send a signal (0: only check); return False if the process does not exist."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
