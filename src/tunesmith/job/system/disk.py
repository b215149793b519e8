"""Disks that take nothing: full, read-only or failing. Standard library only.

A run outlives such a disk: who watches it keeps in memory what could not be written, and a
small reserve of blocks is given up for the last words.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from tunesmith.core import formats
from tunesmith.core.disk import nearest
from tunesmith.core.errors import TunesmithError

FULL = "disk_full"
READ_ONLY = "read_only"
_CLASSES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: READ_ONLY,
    # A failing disk, and a network disk whose server forgot it.
    errno.EIO: READ_ONLY,
    errno.ESTALE: READ_ONLY,
}
# How long a disk that is not full may refuse: unlike room, it seldom comes back by itself.
READ_ONLY_SECONDS = 15.0
RESERVE_BYTES = 256 * 1024
# Of them, what the final status may take.
_STATUS_BYTES = 64 * 1024
_PROBE_BYTES = 64 * 1024
_APPEND_SECONDS = 1.0


def fault(error: BaseException | None) -> str | None:
    """Return the failure class of an error that a disk caused; None for any other.

    An error that was raised while another was handled counts as that one.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _CLASSES:
            return _CLASSES[error.errno]
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden
    return None


def refused(error: OSError) -> bool:
    """Whether this very error says that a disk takes nothing."""
    return error.errno in _CLASSES


def describe(folder: Path, error: OSError) -> str:
    """Return in words what is wrong with the disk of `folder`, and what mends it."""
    why = error.strerror or str(error)
    if _CLASSES.get(error.errno or 0) != FULL:
        return f"{folder}: its disk cannot be written ({why}); remount or exchange it"
    try:
        stat = os.statvfs(nearest(folder))
    except OSError:
        return f"{folder}: its disk is full ({why}); free space there"
    free, files = stat.f_bavail * stat.f_frsize, ""
    if stat.f_files and not stat.f_favail:
        files = " and no inode"
    return f"{folder}: its disk is full ({why}; {formats.size(free)}{files} free); free space there"


def explain(error: OSError, folder: Path) -> TunesmithError:
    """Return the error for people; `folder` is named where the error names no file."""
    named = error.filename if isinstance(error.filename, (str, os.PathLike)) else None
    return TunesmithError(describe(Path(named).parent if named else folder, error))


def refusal(folder: Path, size: int = _PROBE_BYTES) -> OSError | None:
    """Return why the disk of `folder` takes no new file of `size` bytes; None when it does.

    Raises OSError for what is no fault of a disk, such as a missing permission.
    """
    file = nearest(folder) / f".tunesmith-probe-{os.getpid()}"
    try:
        _write_whole(file, size)
    except OSError as error:
        if not refused(error):
            raise
        return error
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    return None


def append(file: Path, line: bytes) -> None:
    """Append a whole line, or none of it; a torn line that a dead writer left is cut off.

    One writer at a time, so that a disk that is full in the middle of a line leaves no half
    of it for another to write behind. Raises OSError: EIO, with the file as it was, also when
    another writer was halted in its write.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, file)
        end = _whole(descriptor)
        try:
            written = os.write(descriptor, line)
        except OSError:
            _truncate(descriptor, end)
            raise
        if written < len(line):
            _truncate(descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(descriptor)


def open_log(file: Path) -> int:
    """Open a log to append to; where its disk refuses that, the output goes nowhere."""
    try:
        return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        if not refused(error):
            raise
    return os.open(os.devnull, os.O_WRONLY)


def _lock(descriptor: int, file: Path) -> None:
    """Take the file for this descriptor; one that waits for ever would hang its run."""
    deadline = time.monotonic() + _APPEND_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OSError(errno.EIO, "another writer is halted in it", str(file)) from None
            time.sleep(0.005)
        else:
            return


def _whole(descriptor: int) -> int:
    """Cut a torn last line off; return the size."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    end = size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    os.ftruncate(descriptor, end)
    return end


def _truncate(descriptor: int, end: int) -> None:
    # A disk that has gone meanwhile: the next writer cuts the torn line off.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, end)


def label(descriptor: int, text: str) -> None:
    """Write who holds a lock into its file; a disk that takes nothing changes no lock."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return  # opened on such a disk
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError as error:
        if not refused(error):
            raise


class Reserve:
    """A file of real blocks, kept so that the last words fit on a disk that is full by then."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def take(self) -> None:
        """Write it, unless an earlier life of the run has left it. Raises OSError."""
        if self._file.is_file() and self._file.stat().st_size == RESERVE_BYTES:
            return
        try:
            _write_whole(self._file, RESERVE_BYTES)
        except OSError:
            self.drop()
            raise

    def shrink(self) -> None:
        """Free all of it but what the final status needs. Raises OSError."""
        if self._file.is_file():
            os.truncate(self._file, _STATUS_BYTES)

    def become(self, file: Path, text: str) -> None:
        """Put `text` in the place of `file`: into blocks we have, so that none is asked for.

        Raises OSError; FileNotFoundError when it was used before.
        """
        descriptor = os.open(self._file, os.O_WRONLY)
        try:
            content = text.encode()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._file.replace(file)

    def drop(self) -> None:
        """Delete it; on a disk that takes nothing it stays, for the next life of the run."""
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            if not refused(error):
                raise


def _write_whole(file: Path, size: int) -> None:
    """Write `size` bytes that no file system can make smaller, and wait for the disk."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        left = memoryview(os.urandom(size))
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
