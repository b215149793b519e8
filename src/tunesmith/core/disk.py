"""Free space, checked before anything is written. Standard library only, Python 3.10."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tunesmith.core import formats
from tunesmith.core.errors import UsageError


def nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Return the bytes this user can write to a folder's disk; the folder may not exist yet."""
    return shutil.disk_usage(nearest(folder)).free


def shortage(where: object, free: int, needed: int, what: str) -> str | None:
    """Return a message if `what` needs more bytes than are free, None otherwise."""
    if free >= needed:
        return None
    return f"{where}: {formats.size(free)} free, {what} needs {formats.size(needed)}"


def require(
    where: Path | str,
    needed: int,
    what: str,
    *,
    hint: str,
    free: int | None = None,
    detail: Sequence[str] = (),
) -> None:
    """Raise UsageError unless `needed` bytes are free.

    `where` is a folder of this machine; with `free` it is only a label for another machine's disk.
    """
    have = free_bytes(Path(where)) if free is None else free
    if (fault := shortage(where, have, needed, what)) is not None:
        raise UsageError(fault, detail, hint=hint)
