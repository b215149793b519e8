"""What a pull brings: the files of a run with size and sha256. Standard library and yaml only.

What may be pulled is an allow-list (job/run/allowed.py), so that a host gives away no code and a
client takes none.

Checksums are kept in the run folder (size and time stamp say whether they still hold), so
that a second look costs no reading.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tunesmith.core.callbacks import OnBytes
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, sha256_of, write_json
from tunesmith.job.run.allowed import FOLDERS, MOST_FILES, RECORD, part_of_allowed, stays
from tunesmith.job.run.codec import Between, decode, encode
from tunesmith.job.run.folder import COPY_FILE, MERGED, RunFolder
from tunesmith.job.run.replies import Leftovers, ListedFile, Manifest

# The parts a pull may ask for. What describes the run (config, status, events, answers,
# proof) always comes along. A report is made of it again where it is wanted.
PARTS = ("adapter", "merged", "report", "log", "predict", "export")
USUAL = ("adapter", "report", "log", "predict")
# Of the record, what speaks of the merged model that lies beside it.
OF_MERGED = ("proof.json", "parity.json")

_CACHE = ".hashes.json"
_TELL_SECONDS = 0.5
_NAMES_TOLD = 5


Nanoseconds = Annotated[int, Between(0, 1 << 64)]


@dataclass(frozen=True)
class _Hashed:
    """A file as it was when it was hashed; `stamp`: its size and mtime then."""

    stamp: tuple[Nanoseconds, ...]
    size: int
    sha256: str


_UNKNOWN = _Hashed((), 0, "")


@dataclass(frozen=True)
class Item:
    """A file of a run: its name below RUN, where it lies, and its part (record: always)."""

    name: str
    path: Path
    part: str


def manifest(
    run: RunFolder,
    what: Iterable[str],
    tell: OnBytes,
    read_always: Collection[str] = (),
) -> Manifest:
    """Return the files of a run that a pull of the parts `what` brings, and what it leaves.

    A file that lies outside the run folder (an `output_dir` of the user's) has its "path"
    too. While a run is `busy` its record and log grow: size and sha256 are those of what
    was there. `tell` hears the bytes read and their total. Files named in `read_always` are
    read even where their time stamp has not changed. Raises UsageError for an unknown part, or
    for more files than any run has.
    """
    parts = tuple(what)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UsageError(f"unknown part {unknown[0]!r} of a run; known are {', '.join(PARTS)}")
    # Before the files are looked at: if nobody worked in it then, they are the final ones.
    busy = run.busy()
    state = run.status().state
    found, left = _sorted_out(run)
    items = [item for item in found if item.part in (RECORD, *parts)]
    if len(items) > MOST_FILES:
        raise UsageError(
            f"run {run.run_id}: {len(items)} files to pull, {MOST_FILES} at most; see what lies in "
            f"{run.path}"
        )
    files = _records(run, items, tell, read_always)
    return Manifest(files, state, busy, Leftovers(len(left), tuple(left[:_NAMES_TOLD])))


def items_of(run: RunFolder) -> list[Item]:
    """Return every file of a run that may be pulled, by name."""
    return _sorted_out(run)[0]


def _sorted_out(run: RunFolder) -> tuple[list[Item], list[str]]:
    """Return the files that may be pulled, and the names of others that need a word."""
    named = [(path.name, path) for path in run.path.iterdir() if not path.is_dir()]
    for name in FOLDERS:
        folder = output_of(run) if name == "output" else run.path / name
        named += [
            (f"{name}/{path.relative_to(folder).as_posix()}", path) for path in _below(folder)
        ]
    items, left = [], []
    for name, path in sorted(named):
        part = part_of_allowed(name) if _plain(path) else None
        if part is not None:
            items.append(Item(name, path, part))
        elif not stays(name):
            left.append(name)
    return items, left


def output_of(run: RunFolder) -> Path:
    """Return where the run's training writes: RUN/output, unless its config says otherwise.

    Where the config cannot be read, RUN/output.
    """
    try:
        config = run.config()
    except (FileNotFoundError, UsageError):
        return run.output
    return run.path / str(config.get("output_dir") or run.output)


def part_of(name: str) -> str:
    """Return the part that a file of a pull belongs to, by its name below RUN."""
    folder, _, rest = name.partition("/")
    if rest:
        return FOLDERS.get(folder, RECORD)
    if name.endswith(".log"):
        return "log"
    return "report" if name.endswith((".html", ".png")) else RECORD


def disown_merged(run_dir: Path) -> None:
    """Let the copy of a host's run know that the merged model in it is made here."""
    run = RunFolder(run_dir)
    if run.is_copy:
        copied = run.copied()
        kept = {
            name: record
            for name, record in copied.files.items()
            if part_of(name) != MERGED and name not in OF_MERGED
        }
        write_json(run_dir / COPY_FILE, encode(replace(copied, files=kept)))


def _plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files of a result, without checkpoints: those are for going on there."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith((".", "checkpoint-", "bad-checkpoint-")):
                yield from _below(path)
        else:
            yield path


def _records(
    run: RunFolder,
    items: list[Item],
    tell: OnBytes,
    read_always: Collection[str] = (),
) -> dict[str, ListedFile]:
    cache_file = run.path / _CACHE
    known = _known(cache_file)
    stamps = {item.name: stamp for item in items if (stamp := _stamp(item.path))}
    # One that is gone since the folder was listed: a heartbeat, when a phase begins.
    items = [item for item in items if item.name in stamps]
    fresh = [
        item
        for item in items
        if item.name in read_always or known.get(item.name, _UNKNOWN).stamp != stamps[item.name]
    ]
    total, done, told = sum(stamps[item.name][0] for item in fresh), 0, time.monotonic()

    def heard(read: int) -> None:
        nonlocal done, told
        done += read
        if time.monotonic() - told >= _TELL_SECONDS:
            told = time.monotonic()
            tell(done, total)

    for item in fresh:
        before = done
        # Not to the file's end: a log grows while we read.
        digest = sha256_of(item.path, heard, most=stamps[item.name][0])
        known[item.name] = _Hashed(stamps[item.name], done - before, digest)
    if fresh:
        write_json(cache_file, encode(known))
    found: dict[str, ListedFile] = {}
    for item in items:
        record = known[item.name]
        outside = None if item.path.is_relative_to(run.path) else str(item.path)
        found[item.name] = ListedFile(record.size, record.sha256, outside)
    return found


def _known(cache_file: Path) -> dict[str, _Hashed]:
    try:
        return {name: decode(_Hashed, item) for name, item in read_json(cache_file).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}  # it only saves time: a damaged one is made again


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return (stat.st_size, stat.st_mtime_ns)
