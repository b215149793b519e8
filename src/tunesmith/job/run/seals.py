"""RUN/seals.json: size and sha256 of every result file, from the moment it was written.

A result is compared with its seal before every use, in full: a bit can rot without the time stamp
changing. What it finds is damage and accidents, not somebody who may write in the run folder.

A name is the file's below RUN (`output/adapter_model.safetensors`, wherever the config's
output_dir lies), and `phase` is who wrote it. run.json and config.yaml are sealed too: they say
what the results were made of. Standard library and yaml only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core import files as core_files
from tunesmith.core.callbacks import OnBytes
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.run import manifest as run_manifest
from tunesmith.job.run.allowed import part_of_allowed
from tunesmith.job.run.events import Summary, read_events
from tunesmith.job.run.folder import COPY_FILE, MANIFEST, RunFolder
from tunesmith.job.run.remedies import SEALS, again, is_copy, part
from tunesmith.job.run.replies import ListedFile
from tunesmith.job.run.schema import FileRecord

# Results that are folders, and those that are files. An entry of `seal` and `check` is one of them.
FOLDERS = ("output", "bundle", "merged", "predict", "export")
ANSWERS = ("before.jsonl", "after.jsonl", "evaluation.json")
FILES = (*ANSWERS, "parity.json", "proof.json", "export.json")
# The environment that a training began in; of no use elsewhere, so a pull leaves it.
ENVIRONMENT = ".environment.json"
REQUEST = ("run.json", "config.yaml", ENVIRONMENT)
# Who sealed what an older version had left, and the request of a run that was pulled.
ADOPTED, SETTLED = "older version", "settled"
_VERSION = 1
_SHA256, _PHASE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[a-z ]{1,32}")
_LOCK = ".seals.lock"
# A tracker writes them when it likes; they are curves, and nothing is made of them.
_CURVES = "events.out.tfevents."
# A model card is written by people; no program reads it.
_CARD = "README.md"
_TELL_SECONDS = 1.0

Record = Mapping[str, Any]
# Hears the bytes read so far and how many there are.


def unheard(_done: int, _total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Check:
    """What of a run was compared: `unsealed` are results that an older version had made."""

    compared: int
    unsealed: tuple[str, ...]


def read(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return {name: {"size", "sha256", "phase"}}; empty for a run of an older version.

    Raises UsageError for a damaged seals.json.
    """
    file = run_dir / SEALS
    try:
        value = read_json(file)
        files: dict[str, dict[str, Any]] = value["files"]
        if isinstance(value["version"], int) and value["version"] > _VERSION:
            raise UsageError(
                f"{file}: made by a newer version of tunesmith (format {value['version']}); "
                "update this one"
            )
        whole = value["version"] == _VERSION and value["sha256"] == _digest(files)
        whole = whole and all(map(_well_formed, files.items()))
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UsageError(
            f"{file}: damaged, so no result of run {run_dir.name} can be compared; "
            + again(run_dir, SEALS)
        )
    return files


@contextlib.contextmanager
def _changing(run_dir: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield the seals to be changed, and write them; one process at a time."""
    with open(run_dir / _LOCK, "wb", opener=_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = read(run_dir)
        before = json.dumps(files, sort_keys=True)
        yield files
        if json.dumps(files, sort_keys=True) != before:
            ordered = dict(sorted(files.items()))
            value = {"version": _VERSION, "sha256": _digest(ordered), "files": ordered}
            write_json(run_dir / SEALS, value)


def _well_formed(item: tuple[str, Any]) -> bool:
    """Whether a seal is one: with a pulled run it comes from a host, and is shown in messages."""
    name, record = item
    return (
        name.isprintable()
        and isinstance(record["size"], int)
        and _SHA256.fullmatch(record["sha256"]) is not None
        and _PHASE.fullmatch(record["phase"]) is not None
    )


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _digest(files: Mapping[str, Record]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def seal(
    run_dir: Path,
    phase: str,
    results: Iterable[str],
    known: Mapping[str, Record] | None = None,
    tell: OnBytes = unheard,
) -> dict[str, dict[str, Any]]:
    """Seal all files of `results` (of FOLDERS, FILES or REQUEST, or one file below a folder).

    `known` are records by name that were made while the file was written: those are not read
    again. Returns what was sealed; seals of files that are gone are dropped.
    """
    results = tuple(results)
    made = _records(run_dir, _found(run_dir, results), known or {}, tell)
    made = {name: {**record, "phase": phase} for name, record in made.items()}
    with _changing(run_dir) as files:
        _drop(files, results)
        files.update(made)
    return made


def forget(run_dir: Path, results: Iterable[str]) -> None:
    """Drop the seals of results that are about to be replaced or removed."""
    if (run_dir / SEALS).is_file():
        with _changing(run_dir) as files:
            _drop(files, tuple(results))


@contextlib.contextmanager
def rewriting(run_dir: Path, phase: str, *names: str) -> Iterator[None]:
    """Let the block replace files of REQUEST; then they are sealed.

    A process that ends between leaves them unsealed, never with the seal of others.
    """
    forget(run_dir, names)
    yield
    seal(run_dir, phase, names)


def _drop(files: dict[str, dict[str, Any]], results: Collection[str]) -> None:
    for name in [name for name in files if name in results or part(name) in results]:
        del files[name]


def check(
    run_dir: Path,
    results: Iterable[str],
    tell: OnBytes = unheard,
    *,
    adopt: bool = True,
) -> Check:
    """Compare the files of `results` with their seals, each read in full.

    Raises UsageError for the first that was changed, is gone or was added, before anything else
    is done. A result that is not there at all is nobody's fault here: who needs it says so.
    One that has no seal is compared with what an older version recorded of it; with `adopt` it
    is sealed as it is. Model cards are passed over: people write them, no program reads them.
    """
    results = tuple(results)
    sealed = {name: record for name, record in read(run_dir).items() if part(name) in results}
    sealed = {name: record for name, record in sealed.items() if _counts(run_dir, name, record)}
    found = _found(run_dir, results)
    kept = {part(name) for name in (*sealed, *REQUEST)}
    unsealed = tuple(name for name in dict.fromkeys(map(part, found)) if name not in kept)
    there = {part(name) for name in found}
    wanted = {n: r for n, r in sealed.items() if part(n) in there or part(n) in REQUEST}
    wanted = {name: record for name, record in wanted.items() if not name.endswith(_CARD)}
    for name in sorted(wanted.keys() - found.keys()):
        raise _changed(run_dir, name, f"missing, expected sha256 {wanted[name]['sha256']}")
    for name in sorted(found.keys() - sealed.keys()):
        if part(name) not in (*unsealed, *REQUEST) and not name.endswith(_CARD):
            raise UsageError(
                f"{found[name]}: was not there when {sealed_by(sealed, name)} ended and may "
                f"change what is read; `mv {found[name]} ..` takes it away"
            )
    sizes = {name: found[name].stat().st_size for name in wanted}
    for name, record in sorted(wanted.items()):
        if sizes[name] != record["size"]:
            raise _changed(
                run_dir,
                name,
                f"expected {record['size']} bytes with sha256 {record['sha256']}, "
                f"found {sizes[name]} bytes",
            )
    _compare(run_dir, {name: found[name] for name in wanted}, wanted, tell)
    if unsealed and adopt:
        _adopt(run_dir, unsealed, tell)
    return Check(len(wanted), unsealed)


def check_files(run_dir: Path, names: Iterable[str]) -> None:
    """Compare single files of results; one that has no seal or is not there is passed over."""
    sealed = read(run_dir)
    found = {name: run_dir / name for name in names if name in sealed}
    _compare(run_dir, {n: p for n, p in found.items() if p.is_file()}, sealed, unheard)


def sealed_by(sealed: Mapping[str, Record], name: str) -> str:
    """Return the phase that sealed the other files of a file's folder."""
    return next(str(r["phase"]) for n, r in sealed.items() if part(n) == part(name))


def refuse_other(run_dir: Path, found: Mapping[str, FileRecord | ListedFile]) -> None:
    """Raise UsageError when a file's sha256 as `found` (by name) is not the one sealed."""
    for name, record in sorted(read(run_dir).items()):
        digest = found[name].sha256 if name in found else record["sha256"]
        if digest != record["sha256"] and name not in REQUEST:
            raise _changed(run_dir, name, f"expected sha256 {record['sha256']}, found {digest}")


def keep(old: Path, new: Path, names: Collection[str]) -> None:
    """Carry the seals of files that stay over from a copy of a run to the one that replaces it.

    `names` are the files of `new` that are those of `old`; the others are the host's, with its
    seals.
    """
    try:
        had = {name: record for name, record in read(old).items() if name in names}
    except UsageError:
        had = {}  # damaged: the pull that mends it must not fail for it
    stays = {part(name) for name in names} - {*REQUEST, SEALS}
    if not had and not (new / SEALS).is_file():
        return
    with _changing(new) as files:
        _drop(files, stays)
        files.update({name: record for name, record in had.items() if part(name) in stays})


def _counts(run_dir: Path, name: str, record: Record) -> bool:
    """Whether a seal is of the file that lies here.

    The request of a pulled run is made again here from the host's: the host's seal is of another.
    """
    if not is_copy(run_dir):
        return True
    # What a pull leaves where it is (the trainer's pickle) is missed by nobody here.
    own = part(name) not in REQUEST or record["phase"] == SETTLED
    return own and part_of_allowed(name) is not None


def _found(run_dir: Path, results: Collection[str]) -> dict[str, Path]:
    """Return the files of results by name."""
    found: dict[str, Path] = {}
    for name in results:
        if name in FOLDERS:
            folder = _folder(run_dir, name)
            found |= {f"{name}/{p.relative_to(folder).as_posix()}": p for p in _below(folder)}
        elif _plain(_place(run_dir, name)):
            found[name] = _place(run_dir, name)
    return found


def _folder(run_dir: Path, result: str) -> Path:
    return run_manifest.output_of(RunFolder(run_dir)) if result == "output" else run_dir / result


def _place(run_dir: Path, name: str) -> Path:
    result, below, rest = name.partition("/")
    return _folder(run_dir, result) / rest if below else run_dir / name


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files of a result; checkpoints have seals of their own."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith((".", "checkpoint-", "bad-checkpoint-")):
                yield from _below(path)
        elif _plain(path) and not path.name.startswith((".", _CURVES)):
            yield path


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _records(
    run_dir: Path, found: Mapping[str, Path], known: Mapping[str, Record], tell: OnBytes
) -> dict[str, dict[str, Any]]:
    sizes = {name: path.stat().st_size for name, path in found.items()}
    total = sum(size for name, size in sizes.items() if name not in known)
    reading = _Reading(tell, total)
    records: dict[str, dict[str, Any]] = {}
    for name, path in found.items():
        digest = known[name]["sha256"] if name in known else reading.sha256_of(path)
        records[name] = {"size": sizes[name], "sha256": digest}
    return records


class _Reading:
    """Hashes files and tells how far it is, within two seconds of the last word."""

    def __init__(self, tell: OnBytes, total: int) -> None:
        self._tell, self._total = tell, total
        self._done, self._told = 0, time.monotonic()

    def sha256_of(self, path: Path) -> str:
        return core_files.sha256_of(path, self._heard)

    def _heard(self, read: int) -> None:
        self._done += read
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            self._tell(self._done, self._total)


def sha256_of(files: Mapping[str, Path], tell: OnBytes) -> Iterator[tuple[str, str]]:
    """Yield (name, sha256) of each file, in order; `tell` hears how far the reading is."""
    reading = _Reading(tell, sum(path.stat().st_size for path in files.values()))
    for name, path in files.items():
        yield name, reading.sha256_of(path)


def _compare(
    run_dir: Path, found: Mapping[str, Path], wanted: Mapping[str, Record], tell: OnBytes
) -> None:
    for name, digest in sha256_of(dict(sorted(found.items())), tell):
        if digest != wanted[name]["sha256"]:
            expected = wanted[name]["sha256"]
            raise _changed(run_dir, name, f"expected sha256 {expected}, found {digest}")


def _adopt(run_dir: Path, results: Collection[str], tell: OnBytes) -> None:
    """Seal what an older version made, after it was compared with what that recorded of it.

    Where the run folder cannot be written (mounted to be read) it stays unsealed.
    """
    found = _found(run_dir, results)
    records = _records(run_dir, found, {}, tell)
    for name, digest in _older(run_dir, results).items():
        if name in records and records[name]["sha256"] != digest:
            found_here = records[name]["sha256"]
            raise _changed(run_dir, name, f"expected sha256 {digest}, found {found_here}")
    with contextlib.suppress(OSError):
        seal(run_dir, ADOPTED, results, records)


def _older(run_dir: Path, results: Collection[str]) -> dict[str, str]:
    """Return the sha256 that older versions recorded of results: of the trained and the merged
    weights, and of what was pulled. Raises UsageError for a damaged manifest."""
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        for event in read_events(run_dir / "events.jsonl"):
            if isinstance(event, Summary) and event.phase == "train":
                files = event.results.get("files", {})
                known |= {f"output/{name}": record["sha256"] for name, record in files.items()}
    if "merged" in results and (run_dir / "merged" / MANIFEST).is_file():
        known |= _merged(run_dir)
    with contextlib.suppress(FileNotFoundError):
        copied = read_json(run_dir / COPY_FILE)["files"]
        ours = {n: r for n, r in copied.items() if part(n) in (*FOLDERS, *FILES)}
        known |= {name: record["sha256"] for name, record in ours.items()}
    return known


def _merged(run_dir: Path) -> dict[str, str]:
    file = run_dir / "merged" / MANIFEST
    try:
        listed = read_json(file)["files"]
        return {f"merged/{name}": str(record["sha256"]) for name, record in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}: damaged ({why}); {again(run_dir, 'merged')}") from None


def _changed(run_dir: Path, name: str, what: str) -> UsageError:
    return UsageError(
        f"{_place(run_dir, name)}: changed since it was made: {what}; {again(run_dir, name)}"
    )
