"""Atomic file operations. Used by both halves: standard library and yaml, Python 3.10."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.core.bounded import open_plain
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import UsageError

# Errors of a file system or kernel without such locks: NFS cannot lock a read-only descriptor.
_NO_FOLDER_LOCK = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock to read, change and rewrite `path`; meant for short operations.

    Each writer replaces `path` itself, so the lock is on its folder, which must exist: that leaves
    no file behind and works across users. If a folder cannot be locked, a file `.NAME.lock` beside
    `path` is locked instead. One process must not take it twice.
    """
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_FOLDER_LOCK:
                raise
            os.close(descriptor)
            beside = path.with_name(f".{path.name}.lock")
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(lock: Path, waiting: OnText) -> Iterator[int]:
    """Hold the lock file `lock` for a long operation; yield its descriptor.

    If another process holds it, `waiting` is called at once with its description. A child that
    inherits the descriptor holds the lock too. The kernel releases it when the last holder ends,
    however it ends.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            waiting(owner or "another process")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can read; restrict an existing one of ours. Return it.

    A folder of another owner (a container's volume) stays as it is. Raises UsageError for a folder
    that others use too, such as /tmp: restricting it would lock them out of their files.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_mode & 0o077 and os.geteuid() in (0, status.st_uid):
        if status.st_mode & stat.S_ISVTX:
            raise UsageError(
                f"{folder} is shared by all users of this machine and would be closed to them",
                hint=f"set TUNESMITH_HOME to a folder of its own, e.g. {folder / 'tunesmith'}",
            )
        folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it over `path`.

    After an error, or a power loss at any moment, `path` is what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        # mkstemp uses 0600. A shared file gets the mode that the umask allows; a file in a private
        # folder stays private, also when it is copied elsewhere.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod((0o666 if path.parent.stat().st_mode & 0o077 else 0o600) & ~umask)
        yield part
        fsync_file(part)
        part.replace(path)
        fsync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def fsync_file(file: Path) -> None:
    """Make the content of `file` survive a power loss."""
    _fsync(file, os.O_RDONLY)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` (new files, renames) survive a power loss."""
    _fsync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON, atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read one of our JSON files (UTF-8). Raises OSError, and ValueError, also for deep nesting."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: lists or objects nested too deep to be read") from None


def parse_yaml(text: str) -> Any:
    """Parse one of our YAML texts, with libyaml if available: it takes a tenth of the time.

    Raises yaml.YAMLError.
    """
    import yaml  # here, because callers that read no YAML must not wait for it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 - both are safe loaders
    except RecursionError:
        raise yaml.YAMLError("lists or keys nested too deep to be read") from None


def sha256_of(
    path: Path, progress: Callable[[int], None] | None = None, most: int | None = None
) -> str:
    """Return the sha256 of a file as 64 hex digits, read in 1 MiB pieces.

    `progress` is called with the bytes of each piece. `most` limits the bytes read, for a file
    that grows.
    """
    digest = hashlib.sha256()
    remaining = sys.maxsize if most is None else most
    with open_plain(path) as stream:
        while remaining and (piece := stream.read(min(remaining, 1 << 20))):
            digest.update(piece)
            remaining -= len(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def short_digest(value: object) -> str:
    """Return 16 hex digits that represent a value in a fingerprint."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
