"""Downloads wheels so that what has come of one is never fetched again, whatever ends this.

    python -I stack/wheel_download.py FOLDER PYLOCK

PYLOCK is what `uv pip compile --format pylock.toml` writes. A wheel grows as a file of its own
and goes on where it ended, also after a SIGKILL. When it is whole, FOLDER/PACKAGE/index.html
lists it (so FOLDER is an index that uv reads by a file:// address) and the package's name is
printed. A wheel that is listed is not fetched: once unpacked it is in uv's cache, and its file can
go. Standard library, Python 3.8: an installation on a host sends this file and runs it there.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# At once. One alone rarely fills a line.
_STREAMS = 8
_STALL_SECONDS = 30
# Between tries that bring nothing; after the last one a wheel is given up.
_PAUSES = (1, 2, 4, 8, 16)
_PIECE = 1 << 18
# uv writes a file a line.
_FILE = re.compile(r'url = "(https?://[^"]+\.whl)".*?sha256 = "([0-9a-f]{64})"')
_TAGS = re.compile(r"-([a-z0-9.]+)-([a-z0-9.]+)-([a-z0-9_.]+)\.whl$")
_MANYLINUX = re.compile(r"manylinux_2_(\d+)_x86_64")
_OLD_NAMES = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}
# The C library that every host has (2.28).
_GLIBC = 28


@dataclass(frozen=True)
class Wheel:
    """A wheel as the index names it."""

    package: str
    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.url.rpartition("/")[2]


class Broken(Exception):
    """A wheel could not be brought; the text says why."""


def wheels(pylock: str) -> Iterator[Wheel]:
    """Yield the wheel of each package for Python 3.10 on x86-64. Raises Broken where none is."""
    for block in pylock.split("[[packages]]")[1:]:
        package = re.search(r'(?m)^name = "([^"]+)"', block)
        ranked = [(rank(url), url, sha256) for url, sha256 in _FILE.findall(block)]
        best = max((one for one in ranked if one[0]), default=None)
        if package is None or best is None:
            raise Broken(f"{package and package[1]}: no wheel of it fits")
        yield Wheel(package[1], *best[1:])


def rank(name: str) -> tuple[int, int] | None:
    """Return how well a wheel fits, None where it does not: the larger, the better."""
    tags = _TAGS.search(name)
    if not tags:
        return None
    python, abi, platforms = (tag.split(".") for tag in tags.groups())
    stable = [int(tag[3:] or 0) for tag in python if tag.startswith("cp3")]
    if "cp310" in python and "cp310" in abi:
        kind = 3
    elif "abi3" in abi and min(stable, default=11) <= 10:
        kind = 2
    elif "none" in abi and {"py3", "py310", "cp310"} & set(python):
        kind = 1
    else:
        return None
    if "any" in platforms:
        return kind, 0
    levels = [_OLD_NAMES.get(tag[: -len("_x86_64")], 99) for tag in platforms]
    levels += [int(found[1]) for found in map(_MANYLINUX.fullmatch, platforms) if found]
    fitting = [level for level in levels if level <= _GLIBC]
    return (kind, max(fitting)) if fitting else None


def bring(folder: Path, wheel: Wheel) -> None:
    """Bring a wheel into its package's folder and list it. Raises Broken."""
    place = folder / wheel.package
    place.mkdir(parents=True, exist_ok=True)
    index = place / "index.html"
    if index.exists() and wheel.sha256 in index.read_text(encoding="utf-8"):
        return
    if not (place / wheel.name).exists():
        _complete(place / wheel.name, wheel)
    with index.open("a", encoding="utf-8") as file:
        file.write(f'<a href="{wheel.name}#sha256={wheel.sha256}">{wheel.name}</a>\n')


def _complete(path: Path, wheel: Wheel) -> None:
    """Fetch until all is there; try again while bytes keep coming."""
    part = path.with_name(f"{path.name}.part")
    in_vain = 0
    while True:
        before = _size(part)
        try:
            if _grow(part, wheel.url) == wheel.sha256:
                part.replace(path)
                return
            part.unlink()
            why = "what came has another sha256 than the index says"
        except OSError as error:
            why = str(error)
        in_vain = 0 if _size(part) > before else in_vain + 1
        if in_vain > len(_PAUSES):
            raise Broken(f"{wheel.url}: {why}")
        time.sleep(_PAUSES[in_vain - 1] if in_vain else 0)


def _grow(part: Path, url: str) -> str:
    """Fetch what is missing of a file; return its sha256. Raises OSError when it was cut."""
    with part.open("ab+") as file:
        file.seek(0)
        digest = hashlib.sha256()
        for piece in iter(lambda: file.read(_PIECE), b""):
            digest.update(piece)
        start = file.tell()
        more = {"Range": f"bytes={start}-"} if start else {}
        # http or https: `wheels` takes no other.
        asked = urllib.request.Request(url, headers=more)  # noqa: S310
        try:
            answer = urllib.request.urlopen(asked, timeout=_STALL_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code == 416:
                # Nothing is missing.
                return digest.hexdigest()
            raise
        with answer:
            if start and answer.status != 206:
                # A server that knows no ranges sends all of it.
                file.truncate(0)
                digest = hashlib.sha256()
            left = int(answer.headers["Content-Length"])
            for piece in iter(lambda: answer.read(_PIECE), b""):
                file.write(piece)
                digest.update(piece)
                left -= len(piece)
    if left:
        raise OSError(f"cut {left} bytes before its end")
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(folder: Path, pylock: Path) -> int:
    """Bring all; return 1 if one could not be brought."""
    broken = []

    def one(wheel: Wheel) -> None:
        try:
            bring(folder, wheel)
        except Broken as error:
            broken.append(str(error))
        else:
            sys.stdout.write(f"{wheel.package}\n")
            sys.stdout.flush()

    try:
        found = list(wheels(pylock.read_text(encoding="utf-8")))
    except Broken as error:
        sys.stderr.write(f"{error}\n")
        return 1
    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(one, found))
    for line in broken:
        sys.stderr.write(f"{line}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
