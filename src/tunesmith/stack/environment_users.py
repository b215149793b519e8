"""Which processes run out of an environment, and for which run. Linux.

A venv's interpreter is a link, so that /proc/PID/exe names another file. What tells is the
command's own name (every process of ours is started as ENVIRONMENT/bin/python) and the
libraries it has mapped, whatever name it was started by.
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
    """A process out of an environment: its command in words, and the run it works on."""

    pid: int
    command: str
    run: str | None


def users_of(environment: Path) -> tuple[User, ...]:
    """Return the processes that run out of an environment, by their ids.

    Of another user's processes nothing can be read: they are not among them.
    """
    places = {str(environment.absolute()), str(environment.resolve())}
    found = []
    for folder in sorted(_PROC.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        # One that ended meanwhile, or is another user's.
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            if any(_uses(folder, words[0], f"{place}{os.sep}") for place in places):
                found.append(User(int(folder.name), " ".join(words).strip(), _run_of(folder)))
    return tuple(found)


def _uses(process: Path, program: str, inside: str) -> bool:
    if os.sep in program:
        started = os.path.normpath((process / "cwd").readlink() / program)
        if started.startswith(inside):
            return True
    return f" {inside}" in (process / "maps").read_text(errors="replace")


def _run_of(process: Path) -> str | None:
    """Return the run whose lock a process holds open, as its supervisor and worker do."""
    for path in _descriptors(process):
        if path.name == _RUN_LOCK and (path.parent / "run.json").is_file():
            return path.parent.name
    return None


def _descriptors(process: Path) -> Iterator[Path]:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            yield descriptor.readlink()
