"""Put a finished file tree in the place of another: at every moment one of them is there, whole.

The kernel exchanges two names in one step (renameat2 of Linux, renamex_np of macOS). A file system
that cannot (some network disks) gets a journal: what was cut off between its two renames is
finished, or taken back, by `recover`, which whoever looks into such a folder calls first. What was
replaced is deleted only when its successor has its name. Used by both halves: standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tunesmith.core.files import fsync_folder, read_json, write_json

_AT_FDCWD = -100  # linux/fcntl.h: names are relative to the working folder
_EXCHANGE = 2  # linux/fs.h RENAME_EXCHANGE and sys/stdio.h RENAME_SWAP
# How a system says that it, or this file system, cannot exchange.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_JOURNAL = ".swap.json"
_OLD = ".swap.old"
_LOCK = ".swap.lock"


def put_in_place(fresh: Path, final: Path) -> None:
    """Give the folder `fresh` the name `final`; what had it before is deleted.

    Both lie on one file system. Killed at any moment, `final` is the old folder or the new one
    (after `recover`, where two names cannot be exchanged), whole; what is left to be deleted lies
    under `fresh` or beside `final` under a hidden name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final.parent)
    if not final.exists():
        fresh.rename(final)
    elif exchange(fresh, final):
        fsync_folder(final.parent)
        # Under its name it would be taken for something to go on with.
        old = _hidden(final, _OLD)
        shutil.rmtree(old, ignore_errors=True)
        fresh.rename(old)
        shutil.rmtree(old)
    else:
        _by_journal(fresh, final)
    fsync_folder(final.parent)


def recover(folder: Path) -> None:
    """Finish, or take back, what a killed `put_in_place` has left half-done in `folder`."""
    if not any(_journals(folder)):
        return
    with _alone(folder):
        for journal in _journals(folder):
            final = folder / journal.name[1 : -len(_JOURNAL)]
            old = _hidden(final, _OLD)
            # The journal was written when `fresh` was whole.
            candidates = [path for path in (*_named(journal), old) if path.exists()]
            if candidates and not final.exists():
                candidates[0].rename(final)
                fsync_folder(folder)
            journal.unlink()
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)


def _named(journal: Path) -> list[Path]:
    """Return the folder that a journal names; of a damaged one none, and the old one stays."""
    try:
        return [Path(str(read_json(journal)["fresh"]))]
    except (ValueError, KeyError, TypeError):
        return []


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where that cannot be done."""
    code = _exchanged(os.fsencode(one), os.fsencode(other))
    if code in _CANNOT:
        return False
    if code:
        raise OSError(code, os.strerror(code), str(one), None, str(other))
    return True


def _exchanged(one: bytes, other: bytes) -> int:
    """Return 0, or errno."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(one, other, ctypes.c_uint(_EXCHANGE))
        else:
            flags = ctypes.c_uint(_EXCHANGE)
            failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, flags)
    except AttributeError:
        return errno.ENOSYS  # a C library from before 2018
    return ctypes.get_errno() if failed else 0


def _by_journal(fresh: Path, final: Path) -> None:
    with _alone(final.parent):
        journal, old = _hidden(final, _JOURNAL), _hidden(final, _OLD)
        shutil.rmtree(old, ignore_errors=True)
        write_json(journal, {"fresh": str(fresh)})
        final.rename(old)
        fresh.rename(final)
        fsync_folder(final.parent)
        journal.unlink()
        shutil.rmtree(old)


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")


def _journals(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.iterdir() if path.name.endswith(_JOURNAL)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(path for path in found if path.name.startswith("."))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for another who swaps, or recovers, in this folder."""
    with (folder / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
