"""Replacing a folder atomically: at every moment either the old or the new one is complete.

The kernel exchanges two names in one step (renameat2 on Linux, renamex_np on macOS). On file
systems that cannot (some network disks) a journal is used: `recover` completes or undoes an
interruption between the two renames; call it before using such a folder. The old folder is deleted
only after the new one has its name. Used by both halves: standard library.
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
# Errors of a system or file system that cannot exchange names.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_JOURNAL = ".swap.json"
_OLD = ".swap.old"
_LOCK = ".swap.lock"


def put_in_place(fresh: Path, final: Path) -> None:
    """Rename the folder `fresh` to `final`, replacing and deleting what was there.

    Both must be on one file system. After a kill at any moment, `final` is the complete old or new
    folder (after `recover`, if names cannot be exchanged); whatever still has to be deleted is at
    `fresh`, or beside `final` under a hidden name.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final.parent)
    if not final.exists():
        fresh.rename(final)
    elif exchange(fresh, final):
        fsync_folder(final.parent)
        # Under the name `fresh` it would look like work to be resumed.
        old = _hidden(final, _OLD)
        shutil.rmtree(old, ignore_errors=True)
        fresh.rename(old)
        shutil.rmtree(old)
    else:
        _by_journal(fresh, final)
    fsync_folder(final.parent)


def recover(folder: Path) -> None:
    """Complete or undo what a killed `put_in_place` left unfinished in `folder`."""
    if not any(_journals(folder)):
        return
    with _alone(folder):
        for journal in _journals(folder):
            final = folder / journal.name[1 : -len(_JOURNAL)]
            old = _hidden(final, _OLD)
            # The journal was written when `fresh` was complete.
            candidates = [path for path in (*_named(journal), old) if path.exists()]
            if candidates and not final.exists():
                candidates[0].rename(final)
                fsync_folder(folder)
            journal.unlink()
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)


def _named(journal: Path) -> list[Path]:
    """Return the folder in a journal; for a damaged journal none, and the old folder stays."""
    try:
        return [Path(str(read_json(journal)["fresh"]))]
    except (ValueError, KeyError, TypeError):
        return []


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the system cannot."""
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
    """Wait for other processes that swap or recover in this folder."""
    with (folder / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
