"""What a pull brings: the files of a run with size and sha256. Standard library and yaml only.

Checksums are kept in the run folder (size and time stamp say whether they still hold), so
that a second look costs no reading.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import UsageError
from tunesmith.files import read_json, write_json
from tunesmith.job.rundir import COPY_FILE, RunFolder

# The parts a pull may ask for. What describes the run (config, status, events, answers,
# proof) always comes along.
PARTS = ("adapter", "merged", "report", "log", "predict", "export")
USUAL = ("adapter", "report", "log", "predict")
RECORD = "record"
MERGED = "merged"
# Of the record, what speaks of the merged model that lies beside it.
OF_MERGED = ("proof.json", "parity.json")

# The folders of a pull, and the part each belongs to. `around` is what a merge elsewhere needs
# besides the adapter.
_FOLDERS = {
    "output": "adapter",
    "around": "adapter",
    "merged": MERGED,
    "predict": "predict",
    "export": "export",
}
_CACHE = ".hashes.json"
_TELL_SECONDS = 0.5


@dataclass(frozen=True)
class Item:
    """A file of a run: its name below RUN, where it lies, and its part (record: always)."""

    name: str
    path: Path
    part: str


def manifest(
    run: RunFolder,
    what: Iterable[str],
    tell: Callable[[int, int], None],
    read_always: Collection[str] = (),
) -> dict[str, Any]:
    """Return {"files": {name: {"size", "sha256"}}, "state", "busy"} of a run.

    A file that lies outside the run folder (an `output_dir` of the user's) has its "path"
    too. While a run is `busy` its record and log grow: size and sha256 are those of what
    was there. `tell` hears the bytes read and their total. Files named in `read_always` are
    read even where their time stamp has not changed. Raises UsageError for an unknown part.
    """
    parts = tuple(what)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UsageError(f"unknown part {unknown[0]!r} of a run; known are {', '.join(PARTS)}")
    # Before the files are looked at: if nobody worked in it then, they are the final ones.
    busy = run.busy()
    state = run.status()["state"]
    items = [item for item in items_of(run) if item.part in (RECORD, *parts)]
    return {"files": _records(run, items, tell, read_always), "state": state, "busy": busy}


def items_of(run: RunFolder) -> list[Item]:
    """Return every file of a run that may be pulled, by name."""
    found = [
        Item(path.name, path, part_of(path.name))
        for path in run.path.iterdir()
        if _whole(path) and path != run.lock_file
    ]
    for name, part in _FOLDERS.items():
        folder = output_of(run) if name == "output" else run.path / name
        found += [
            Item(f"{name}/{path.relative_to(folder).as_posix()}", path, part)
            for path in _below(folder)
        ]
    return sorted(found, key=lambda item: item.name)


def output_of(run: RunFolder) -> Path:
    """Return where the run's training writes: RUN/output, unless its config says otherwise."""
    try:
        config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return run.output
    return run.path / str((config or {}).get("output_dir") or run.output)


def part_of(name: str) -> str:
    """Return the part that a file of a pull belongs to, by its name below RUN."""
    folder, _, rest = name.partition("/")
    if rest:
        return _FOLDERS.get(folder, RECORD)
    if name.endswith(".log"):
        return "log"
    return "report" if name.endswith((".html", ".png")) else RECORD


def disown_merged(run_dir: Path) -> None:
    """Let the copy of a host's run know that the merged model in it is made here."""
    copy = run_dir / COPY_FILE
    if copy.is_file():
        told = read_json(copy)
        for name in list(told["files"]):
            if part_of(name) == MERGED or name in OF_MERGED:
                del told["files"][name]
        write_json(copy, told)


def _whole(path: Path) -> bool:
    """Whether it is a plain file, and not one that is half-written or only the host's."""
    return path.is_file() and not path.is_symlink() and not path.name.startswith(".")


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files of a result, without checkpoints: those are for going on there."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith((".", "checkpoint-", "bad-checkpoint-")):
                yield from _below(path)
        elif _whole(path):
            yield path


def _records(
    run: RunFolder,
    items: list[Item],
    tell: Callable[[int, int], None],
    read_always: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    cache_file = run.path / _CACHE
    known = _known(cache_file)
    stamps = {item.name: stamp for item in items if (stamp := _stamp(item.path))}
    # One that is gone since the folder was listed: a heartbeat, when a phase begins.
    items = [item for item in items if item.name in stamps]
    fresh = [
        item
        for item in items
        if item.name in read_always or known.get(item.name, {}).get("stamp") != stamps[item.name]
    ]
    total, done, told = sum(stamps[item.name][0] for item in fresh), 0, time.monotonic()
    for item in fresh:
        digest, left = hashlib.sha256(), stamps[item.name][0]
        with item.path.open("rb") as stream:
            # Not to the file's end: a log grows while we read.
            while left and (piece := stream.read(min(left, 1 << 20))):
                digest.update(piece)
                left -= len(piece)
                done += len(piece)
                if time.monotonic() - told >= _TELL_SECONDS:
                    told = time.monotonic()
                    tell(done, total)
        size = stamps[item.name][0] - left
        known[item.name] = {"stamp": stamps[item.name], "size": size, "sha256": digest.hexdigest()}
    if fresh:
        write_json(cache_file, known)
    found: dict[str, dict[str, Any]] = {}
    for item in items:
        record = {key: known[item.name][key] for key in ("size", "sha256")}
        outside = {} if item.path.is_relative_to(run.path) else {"path": str(item.path)}
        found[item.name] = record | outside
    return found


def _known(cache_file: Path) -> dict[str, Any]:
    try:
        known = read_json(cache_file)
    except (FileNotFoundError, ValueError):
        return {}  # it only saves time: a damaged one is made again
    return known if isinstance(known, dict) else {}


def _stamp(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]
