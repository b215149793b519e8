"""Safe unpacking of untrusted archives. Standard library, Python 3.10.

tarfile's own `filter="data"` came late in 3.10 and was bypassed later (CVE-2025-4517 and
related), so neither tarfile nor zipfile decides where bytes are written: every entry is checked
first, then its bytes are copied into a file that we open ourselves.
"""

from __future__ import annotations

import functools
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tunesmith.core import formats
from tunesmith.core.bounded import kind_fault, open_plain
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.printable import printable

_PIECE = 1 << 20
_MAX_NAME = 1024
_LONGEST_NAME = 255  # bytes of a file's name, on every file system in use
# Of an extended header (such as a long name), which is read completely before any check.
_MAX_EXTENDED = 64 << 10
# Of a zip's central directory, which is read completely, too.
_MAX_DIRECTORY = 16 << 20

_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    # RecursionError: an endless chain of headers.
    *(EOFError, NotImplementedError, OSError, ValueError, RecursionError),
)


@dataclass(frozen=True)
class UnpackLimits:
    """The most that an archive may unpack: entries and bytes."""

    entries: int = 2_000
    size: int = 1_000_000_000_000


@dataclass(frozen=True)
class _Entry:
    """A file or folder of an archive; `fault` is the reason to refuse it ("" if there is none)."""

    name: str
    size: int
    is_folder: bool
    fault: str
    open: Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    """Return whether `path` is a tar (plain or compressed) or zip file."""
    return path.is_file() and (zipfile.is_zipfile(path) or _is_tar(path))


def extract(archive: Path, folder: Path, limits: UnpackLimits | None = None) -> None:
    """Unpack a .tar, .tar.gz or .zip below `folder`, which must exist and be empty.

    The whole archive is checked before the first byte is written. Raises UsageError for an
    absolute name, `..`, a link, a device, a duplicate, an encrypted or sparse entry, or
    more than `limits`; TunesmithError if the archive is truncated or damaged.
    """
    limits = limits or UnpackLimits()
    try:
        if fault := kind_fault(archive):
            raise UsageError(f"{archive}: {fault}, not an archive")
        if zipfile.is_zipfile(archive):
            _check_directory(archive)
            with zipfile.ZipFile(archive) as opened_zip:
                _extract(archive, lambda: _zip_entries(opened_zip), folder, limits)
        elif _is_tar(archive):
            with tarfile.open(archive, tarinfo=_Header) as opened_tar:
                _extract(archive, lambda: _tar_entries(opened_tar), folder, limits)
        else:
            raise UsageError(f"{archive}: not a .tar, .tar.gz or .zip archive")
    except _RefusedError as error:
        raise UsageError(f"{archive}: {error}; nothing was unpacked") from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise TunesmithError(
            f"{archive}: the archive is truncated or damaged ({error})", hint="copy it again"
        ) from error


class _RefusedError(Exception):
    """A header that must not be read."""


class _Header(tarfile.TarInfo):
    """A tar header, checked before tarfile reads the data it announces.

    tarfile calls these methods of its own class (CPython 3.10 to 3.13); tests/unit/test_caps.py
    fails with a version that does not.
    """

    def _proc_member(self, opened: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and not 0 <= self.size <= _MAX_EXTENDED:
            raise _RefusedError(f"a header of {formats.size(self.size)} says more about a file")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _RefusedError(f"{self.name!r} is sparse")
        member: tarfile.TarInfo = super()._proc_member(opened)  # type: ignore[misc]
        return member

    def _sparse(self, *_: object) -> None:
        raise _RefusedError(f"{self.name!r} is sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def _is_tar(path: Path) -> bool:
    """Like tarfile.is_tarfile, but a file whose first header is refused counts as a tar, too."""
    try:
        tarfile.open(path, tarinfo=_Header).close()
    except _RefusedError:
        return True
    except _DAMAGED:
        return False
    return True


def _check_directory(archive: Path) -> None:
    """Raise UsageError for a zip whose central directory is too large to read."""
    with open_plain(archive) as stream:
        record = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
    if record and int(record[zipfile._ECD_SIZE]) > _MAX_DIRECTORY:  # type: ignore[attr-defined]
        size = formats.size(record[zipfile._ECD_SIZE])  # type: ignore[attr-defined]
        raise UsageError(f"{archive}: its list of files has {size}; nothing was unpacked")


def _extract(
    archive: Path, entries: Callable[[], Iterator[_Entry]], folder: Path, limits: UnpackLimits
) -> None:
    _check(archive, entries(), limits)
    remaining = limits.size
    for entry in entries():
        target = folder.joinpath(*_parts(entry.name))
        if entry.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        source = entry.open()
        if source is None:
            raise UsageError(f"{archive}: {entry.name!r} is not a file; nothing was unpacked")
        with source, target.open("xb") as out:
            # The header may give a false size; the limit applies to the bytes written.
            while piece := source.read(_PIECE):
                remaining -= len(piece)
                if remaining < 0:
                    raise _too_large(archive, limits)
                out.write(piece)
        if target.stat().st_size != entry.size:
            raise TunesmithError(
                f"{archive}: {entry.name} has {target.stat().st_size} bytes, the archive says "
                f"{entry.size}",
                hint="copy it again",
            )


def _check(archive: Path, entries: Iterable[_Entry], limits: UnpackLimits) -> None:
    seen: dict[tuple[str, ...], bool] = {}
    total = 0
    for count, entry in enumerate(entries, 1):
        # Also ends a tar whose headers lead back to themselves (CVE-2025-8194).
        if count > limits.entries:
            raise UsageError(f"{archive}: more than {limits.entries} entries; nothing was unpacked")
        fault = entry.fault or _name_fault(entry.name)
        parts = _parts(entry.name)
        if not fault and not parts and not entry.is_folder:
            fault = "has no name"
        if not fault and parts in seen and not (entry.is_folder and seen[parts]):
            fault = "appears twice"
        if not fault and any(seen.get(parts[:n]) is False for n in range(1, len(parts))):
            fault = "is below a file"
        if fault:
            raise UsageError(f"{archive}: {entry.name!r} {fault}; nothing was unpacked")
        seen[parts] = entry.is_folder
        total += entry.size
        if total > limits.size:
            raise _too_large(archive, limits)
    # A file listed before entries that use its name as a folder.
    for parts, is_folder in seen.items():
        if not is_folder and any(o != parts and o[: len(parts)] == parts for o in seen):
            name = "/".join(parts)
            raise UsageError(f"{archive}: {name!r} is a file and a folder; nothing was unpacked")


def _too_large(archive: Path, limits: UnpackLimits) -> UsageError:
    size = formats.size(limits.size)
    return UsageError(f"{archive}: unpacks to more than {size}, the limit for the free space")


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part != ".")


def _name_fault(name: str) -> str:
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "is an absolute name"
    if ".." in name.split("/"):
        return "leads out of the folder"
    if "\\" in name or printable(name) != name or "\n" in name or "\t" in name:
        return "is not a plain name"
    if len(name) > _MAX_NAME or any(len(p.encode()) > _LONGEST_NAME for p in name.split("/")):
        return "has a name that is too long"
    return ""


def _tar_entries(opened: tarfile.TarFile) -> Iterator[_Entry]:
    for member in opened:
        fault = ""
        if member.issym() or member.islnk():
            fault = "is a link"
        elif not (member.isreg() or member.isdir()):
            fault = "is a device or a pipe"
        elif member.issparse() or member.size < 0:
            fault = "is sparse"
        yield _Entry(
            name=member.name,
            size=member.size if member.isreg() else 0,
            is_folder=member.isdir(),
            fault=fault,
            open=functools.partial(opened.extractfile, member),
        )


def _zip_entries(opened: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in opened.infolist():
        mode = info.external_attr >> 16
        fault = ""
        if stat.S_ISLNK(mode):
            fault = "is a link"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "is a device or a pipe"
        elif info.flag_bits & 0x1:
            fault = "is encrypted"
        yield _Entry(
            name=info.filename,
            size=0 if info.is_dir() else info.file_size,
            is_folder=info.is_dir(),
            fault=fault,
            open=functools.partial(opened.open, info),
        )
