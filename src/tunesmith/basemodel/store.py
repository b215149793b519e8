"""The store of verified base models. Standard library, Python 3.10.

`store`/<owner>--<name>@<what>/tunesmith-model.json contains size, sha256 and time stamp of every
file of a base model. The files are beside it, or in huggingface_hub's own cache. While size and
time stamp match the manifest, a model needs neither network nor hashing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from tunesmith.basemodel.files import FileRecord, Problem
from tunesmith.core.callbacks import OnText
from tunesmith.core.files import held, locked, read_json, sha256_of, write_json

MANIFEST = "tunesmith-model.json"


@dataclass(frozen=True)
class ModelFolder:
    """A verified base model.

    `source` is hub:URL, pypi:package==version, folder, folder:PATH or archive:PATH;
    `revision` the commit (None for a folder of unknown revision); `fetched`
    whether this call downloaded it.
    """

    name: str
    path: Path
    source: str
    revision: str | None
    files: Mapping[str, FileRecord]
    fetched: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())


@dataclass(frozen=True)
class Entry:
    """A stored model, the requested revision, and its files' time stamps (ns)."""

    manifest: Path
    model: ModelFolder
    requested: str | None
    stamps: Mapping[str, int]
    when: str


def safe_name(name: str) -> str:
    """Return a file name for a repo id; a folder's path becomes a digest."""
    if name.startswith("/"):
        return f"folder--{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return name.replace("/", "--")


def entries(store: Path, name: str) -> tuple[Entry, ...]:
    """Return the stored versions of a model, newest first, without checking them."""
    pattern = f"{glob.escape(safe_name(name))}@*/{MANIFEST}"
    found = [entry for path in store.glob(pattern) if (entry := _read(path, name))]
    return tuple(sorted(found, key=lambda entry: entry.when, reverse=True))


def is_here(store: Path, name: str, revision: str | None = None) -> bool:
    """Whether a model lies here with all its files, by their sizes alone: a folder, or one of the
    store, of that revision where one is named."""
    if name.startswith(("/", "./", "../", "~")) or Path(name).is_dir():
        return True
    return any(
        all(_size(entry.model.path / file) == record.size for file, record in files.items())
        for entry in entries(store, name)
        if revision in (None, entry.model.revision, entry.requested)
        and (files := entry.model.files)
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def check(entry: Entry, full: bool = False) -> tuple[Problem, ...]:
    """Return the differences between the files and the manifest.

    A file is read again only with `full`, or if its time stamp has changed; if it still has its
    sha256, the new time stamp is stored.
    """
    problems = []
    stamps = dict(entry.stamps)
    for name, record in entry.model.files.items():
        path = entry.model.path / name
        try:
            status = path.stat()
        except FileNotFoundError:
            problems.append(Problem(name, f"missing, expected {record.size} bytes"))
            continue
        if status.st_size != record.size:
            fault = f"expected {record.size} bytes, found {status.st_size}"
            problems.append(Problem(name, fault))
        elif full or status.st_mtime_ns != stamps.get(name):
            found = sha256_of(path)
            if found != record.sha256:
                fault = f"expected sha256 {record.sha256}, found {found}"
                problems.append(Problem(name, fault))
            stamps[name] = status.st_mtime_ns
    if not problems and stamps != dict(entry.stamps):
        with locked(entry.manifest):
            # A manifest written meanwhile takes precedence.
            if _read(entry.manifest, entry.model.name) == entry:
                _write(dataclasses.replace(entry, stamps=stamps))
    return tuple(problems)


def record(folder: Path, model: ModelFolder, requested: str | None) -> None:
    """Write the manifest of `model` into `folder`: the model's own, or one of the store."""
    stamps = {name: (model.path / name).stat().st_mtime_ns for name in model.files}
    when = datetime.now(timezone.utc).isoformat()
    _write(Entry(folder / MANIFEST, model, requested, stamps, when))


@contextlib.contextmanager
def fetching(store: Path, name: str, waiting: OnText) -> Iterator[None]:
    """Hold the lock of a model's fetch; `waiting` is called with its holder, if there is one.

    The kernel releases it when the process ends, however it ends.
    """
    store.mkdir(parents=True, exist_ok=True)
    with held(store / f".{safe_name(name)}.lock", waiting):
        yield


def _read(path: Path, name: str) -> Entry | None:
    """Return a manifest, None if it is invalid (the model then counts as not downloaded)."""
    try:
        raw = read_json(path)
        files = {k: FileRecord(int(v["size"]), str(v["sha256"])) for k, v in raw["files"].items()}
        model = ModelFolder(
            name=raw["name"],
            path=path.parent / raw["path"],
            source=raw["source"],
            revision=raw["revision"],
            files=files,
            fetched=False,
        )
        stamps = {k: int(v["mtime_ns"]) for k, v in raw["files"].items()}
        entry = Entry(path, model, raw["requested"], stamps, str(raw["fetched_at"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if model.name == name and files else None


def _write(entry: Entry) -> None:
    model, home = entry.model, entry.manifest.parent
    write_json(
        entry.manifest,
        {
            "name": model.name,
            # Relative if the files are beside the manifest: the folder may be moved.
            "path": "." if model.path == home else str(model.path),
            "source": model.source,
            "revision": model.revision,
            "requested": entry.requested,
            "fetched_at": entry.when,
            "files": {
                name: {
                    "size": record.size,
                    "sha256": record.sha256,
                    "mtime_ns": entry.stamps[name],
                }
                for name, record in sorted(model.files.items())
            },
        },
    )
