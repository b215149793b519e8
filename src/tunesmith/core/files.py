"""Files that are whole or absent. Used by both halves: standard library and yaml, Python 3.10."""

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

# A file system, or a kernel, that cannot: NFS refuses a lock on a folder opened to be read.
_NO_FOLDER_LOCK = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one who reads `path`, changes it and writes it again; made for short work.

    `path` itself is replaced by each writer, so the lock is on its folder, which must exist: it
    leaves nothing there, and holds between users too. Where a folder cannot be locked a file
    `.NAME.lock` beside `path` is. Not to be taken twice by one process.
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
    """Hold the lock file `lock` for long work; yield its descriptor.

    `waiting` hears at once who holds it, if somebody does. A child that gets the descriptor
    holds it too. The kernel lets go of it when the last of them ends, however it ends.
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
    """Make a folder that only its owner can look into; one of ours that is open is closed.

    Returns it. One that belongs to somebody else (a volume of a container) stays as it is. Raises
    UsageError for one that others use too, as /tmp: closing it would take their files from them.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = folder.stat()
    if there.st_mode & 0o077 and os.geteuid() in (0, there.st_uid):
        if there.st_mode & stat.S_ISVTX:
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
        # mkstemp makes 0600; a file people share should get what their umask allows, one in a
        # folder that is its owner's alone stays so when it is copied out.
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
    """Make what `file` holds survive a power loss."""
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
    """Read UTF-8 JSON of ours. Raises OSError and ValueError, of deep nesting too."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: lists or objects nested too deep to be read") from None


def parse_yaml(text: str) -> Any:
    """Return what YAML of ours says, by libyaml where there is one: a tenth of the time.

    Raises yaml.YAMLError.
    """
    import yaml  # here: who reads no YAML must not wait for it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 - both are safe loaders
    except RecursionError:
        raise yaml.YAMLError("lists or keys nested too deep to be read") from None


def sha256_of(
    path: Path, progress: Callable[[int], None] | None = None, most: int | None = None
) -> str:
    """Return the sha256 of a file as 64 hex digits, read in 1 MiB pieces.

    `progress` hears the bytes of each piece. Of a file that grows, only its first `most` bytes
    are read.
    """
    digest = hashlib.sha256()
    left = sys.maxsize if most is None else most
    with open_plain(path) as stream:
        while left and (piece := stream.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def short_digest(value: object) -> str:
    """Return 16 hex digits that stand for a value in a state's fingerprint."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
