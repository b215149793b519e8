"""MANIFEST.json of a merged model: its inputs, and size and sha256 of each file.

It is part of the model, so that a copy can be checked without the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.basemodel.files import FileRecord
from tunesmith.core.files import locked, read_json, sha256_of, write_json
from tunesmith.job.run.folder import MANIFEST

Files = dict[str, FileRecord]


@dataclass(frozen=True)
class BaseOrigin:
    """The base model of a merge: its repository id, revision (a commit) and files."""

    name: str | None
    revision: str | None
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class AdapterOrigin:
    """A merged adapter: name of its folder, sha256 of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True)
class LoraOrigin:
    """The last adapter's parameters; `scale` is the factor of B @ A."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class Origin:
    """The inputs and options of a merged model, without paths of the machine that made it."""

    run: str
    base: BaseOrigin
    adapters: tuple[AdapterOrigin, ...]
    lora: LoraOrigin
    dtype: str  # PyTorch's name: bfloat16, float16 or float32
    arithmetic: str  # the library that computed the sums
    parity: bool
    corrected: tuple[str, ...]  # files


def write(folder: Path, origin: Origin, hashes: Mapping[str, str] | None = None) -> Files:
    """Write the manifest of `folder`, hashing every file whose sha256 is not in `hashes`.

    Returns the files.
    """
    files = listing(folder, hashes)
    listed = {name: asdict(record) for name, record in files.items()}
    write_json(folder / MANIFEST, {"format": 1, **asdict(origin), "files": listed})
    return files


def note(folder: Path, key: str, value: object) -> None:
    """Add one fact to a manifest; files and hashes stay."""
    with locked(folder / MANIFEST):
        write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), key: value})


def listing(folder: Path, hashes: Mapping[str, str] | None = None) -> Files:
    """Return the record of each file except the manifest itself."""
    computed = hashes or {}
    return {
        file.name: FileRecord(file.stat().st_size, computed.get(file.name) or sha256_of(file))
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }


def faults(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Return the differences between `files` (a listing) and the manifest."""
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST}: missing"]
    listed = {
        name: FileRecord(record["size"], record["sha256"])
        for name, record in read_json(folder / MANIFEST)["files"].items()
    }
    wrong = [f"{name}: missing, {MANIFEST} names it" for name in sorted(listed.keys() - files)]
    wrong += [f"{name}: not listed in {MANIFEST}" for name in sorted(files.keys() - listed.keys())]
    for name in sorted(listed.keys() & files.keys()):
        merged, now = listed[name], files[name]
        if merged.size != now.size:
            wrong.append(f"{name}: size {now.size}, {merged.size} when merged")
        elif merged.sha256 != now.sha256:
            wrong.append(f"{name}: sha256 {now.sha256}, {merged.sha256} when merged")
    return wrong
