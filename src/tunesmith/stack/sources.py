"""tunesmith's sources for a host: one archive with the same bytes for the same tree.

It contains only what runs there: job/ and what it imports and reads. So a change of a verb or of
the report needs no provision and no build.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

# What runs on a host, and for a run in the image, relative to the repository root. The version of
# what the two halves say to each other is part of it (job/run/schema.py: CONTRACT).
_JOB = (
    "src/tunesmith/__init__.py",
    "src/tunesmith/py.typed",
    "src/tunesmith/basemodel",
    "src/tunesmith/core",
    "src/tunesmith/job",
    "configs/models.yml",
    "configs/mirrors",
)
# The image has verbs of its own besides.
_IMAGE = ("src/tunesmith", "pyproject.toml", "configs/models.yml", "configs/mirrors")


@functools.cache
def app_tar(root: Path) -> bytes:
    """Return the tar archive of what runs on a host, from below a repository root.

    Names are sorted; times, owners and modes are fixed, so it depends on the files alone.
    """
    return _tar(root, _JOB)


def _tar(root: Path, what: tuple[str, ...]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in _files(root, what):
            entry = tarfile.TarInfo(path.relative_to(root).as_posix())
            content = path.read_bytes()
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def app_digest(root: Path) -> str:
    """Return the sha256 of the tar, as 64 hex digits: what clients, hosts and images compare.

    Of what is inside the gzip file, whose own bytes depend on the version of zlib.
    """
    return hashlib.sha256(app_tar(root)).hexdigest()


def image_digest(root: Path) -> str:
    """Return the sha256, as 64 hex digits, of all sources that an image has, its verbs included."""
    return hashlib.sha256(_tar(root, _IMAGE)).hexdigest()


def write_app_archive(root: Path, path: Path) -> None:
    """Write the archive to `path` as tar.gz."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as stream:
        stream.write(app_tar(root))


def _files(root: Path, what: tuple[str, ...]) -> Iterator[Path]:
    for name in what:
        top = root / name
        yield from sorted(filter(_ours, top.rglob("*"))) if top.is_dir() else [top]


def _ours(path: Path) -> bool:
    """Leave out bytecode, and what editors and systems leave behind (.swp, .DS_Store, x~)."""
    passing = path.name.startswith(".") or path.name.endswith(("~", ".pyc"))
    return path.is_file() and not passing and "__pycache__" not in path.parts
