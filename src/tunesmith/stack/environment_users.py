"""Processes that use an environment, and their runs. Linux.

A venv's interpreter is a link, so /proc/PID/exe is another file. Processes are identified by their
command (ours start as ENVIRONMENT/bin/python) and by their mapped libraries, whatever the command.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_RUN_LOCK = "run.lock"


@dataclass(frozen=True)
class User:
    """A process that uses an environment: its command line, and its run."""

    pid: int
    command: str
    run: str | None


def users_of(environment: Path) -> tuple[User, ...]:
    """Return the processes that use an environment, sorted by id.

    Other users' processes cannot be read and are not included.
    """
    roots = {str(environment.absolute()), str(environment.resolve())}
    found = []
    for folder in sorted(_PROC.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        # The process may have ended, or belong to another user.
        with contextlib.suppress(OSError):
            argv = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            if any(_uses(folder, argv[0], f"{root}{os.sep}") for root in roots):
                found.append(User(int(folder.name), " ".join(argv).strip(), _run_of(folder)))
    return tuple(found)


def _uses(process: Path, program: str, inside: str) -> bool:
    if os.sep in program:
        started = os.path.normpath((process / "cwd").readlink() / program)
        if started.startswith(inside):
            return True
    return f" {inside}" in (process / "maps").read_text(errors="replace")


def _run_of(process: Path) -> str | None:
    """Return the run whose lock a process holds, like its supervisor and worker."""
    for path in _descriptors(process):
        if path.name == _RUN_LOCK and (path.parent / "run.json").is_file():
            return path.parent.name
    return None


def _descriptors(process: Path) -> Iterator[Path]:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            yield descriptor.readlink()
