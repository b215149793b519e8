"""Split a data set into training and validation rows that share nothing.

Which rows are held out depends on the seed and on what the rows say, not on their order:
the same rows give the same split on any machine, and a row keeps its side, but for a few
at the edge, when others are added. Rows with the same question, and near-duplicates, form
a group, which stays together; else the validation loss would measure memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.files import fsync_folder, sha256_of
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.near_duplicates import Sketches, normal
from tunesmith.dataset.reading import JSON_SUFFIXES, Reader, Tables, values_of
from tunesmith.dataset.registry import REGISTRY, check_key, load_registry, resolve, write_entries
from tunesmith.dataset.texts import texts_of

_LISTED_AT_MOST = 100_000  # rows of a table that are written as one JSON list


@dataclass(frozen=True)
class Part:
    """One side of a split: its registry entry, file and number of rows."""

    entry: Entry
    file: Path
    rows: int


@dataclass(frozen=True)
class Split:
    """What was written, or would be. `joined`: rows that follow another into its group."""

    train: Part
    validation: Part
    joined: int
    changed: bool


def split(
    dataset_dir: Path,
    key: str,
    share: float,
    seed: int,
    *,
    replace_files: bool = False,
    tables: Tables | None = None,
    dry: bool = False,
) -> Split:
    """Write KEY_train and KEY_validation, files and entries; `share` of the rows is held out.

    Files appear whole, and the entries after them, in one write. The same call again changes
    nothing. Raises UsageError, with nothing written, for a share that leaves a side empty,
    for a data set with faults, and when other files or entries have the names.
    """
    if not 0 < share < 1:
        raise UsageError(
            f"the held-out share is {share}", hint="choose a --share between 0 and 1, e.g. 0.1"
        )
    check_key(key)
    (entry,) = resolve(dataset_dir, key)
    if entry.remote:
        raise UsageError(f"data set {key} is {entry.remote}: only files here can be split")
    path = entry.path(dataset_dir)
    report = check_file(path, entry, tables=tables)
    if report.rows is None:
        raise UsageError(
            f"{path}: {report.findings[0].message}",
            hint="install the training environment with `inv stack.install`",
        )
    report.raise_if_bad()
    held, joined = _held_out(path, entry, share, seed, tables)
    total = report.rows
    if not 0 < len(held) < total:
        raise UsageError(
            f"{path}: {total} rows, similar ones kept together, cannot be split so that "
            f"{share} is held out",
            hint="choose another --share, or add rows",
        )
    suffix = _suffix(path, tables, total)
    names = {side: f"{key}_{side}" for side in ("train", "validation")}
    parts = {
        side: Part(
            replace(entry, key=name, file_name=f"{name}{suffix}"),
            dataset_dir / f"{name}{suffix}",
            len(held) if side == "validation" else total - len(held),
        )
        for side, name in names.items()
    }
    if dry:
        return Split(parts["train"], parts["validation"], joined, changed=False)
    changed = _write(path, entry, held, parts, dataset_dir, replace_files, tables)
    return Split(parts["train"], parts["validation"], joined, changed)


def _held_out(
    path: Path, entry: Entry, share: float, seed: int, tables: Tables | None
) -> tuple[set[int], int]:
    """Return the rows held out, counted from 0, and how many rows joined another's group."""
    groups = _Groups()
    sketches, batch = Sketches(), []
    for value in values_of(Reader(path, tables).pieces()):
        question, answer = texts_of(value, entry)
        groups.add(_hash(normal(question) or normal(answer)))
        batch.append(f"{question}\n{answer}")
        if len(batch) >= 2000:
            sketches.add(batch)
            batch = []
    sketches.add(batch)
    for pair in sketches.pairs():
        groups.join(pair.first, pair.again)
    members = groups.members()
    rows = sum(map(len, members.values()))
    wanted = max(1, round(rows * share))
    salt = str(seed).encode()
    held: set[int] = set()
    for name in sorted(members, key=lambda name: (_hash_bytes(salt + name.to_bytes(8)), name)):
        if len(held) + len(members[name]) <= wanted:
            held.update(members[name])
        if len(held) == wanted:
            break
    return held, rows - len(members)


class _Groups:
    """Rows that belong together: a union of hashes."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._above: dict[int, int] = {}

    def add(self, name: int) -> None:
        self._rows.append(name)
        self._above.setdefault(name, name)

    def join(self, row: int, other: int) -> None:
        a, b = self._top(self._rows[row]), self._top(self._rows[other])
        self._above[max(a, b)] = min(a, b)

    def members(self) -> dict[int, list[int]]:
        """Return the rows of each group, under its smallest hash."""
        found: dict[int, list[int]] = {}
        for row, name in enumerate(self._rows):
            found.setdefault(self._top(name), []).append(row)
        return found

    def _top(self, name: int) -> int:
        while (above := self._above[name]) != name:
            self._above[name] = self._above[above]
            name = above
        return name


def _hash(text: str) -> int:
    return int.from_bytes(_hash_bytes(text.encode("utf-8", "surrogatepass")))


def _hash_bytes(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _suffix(path: Path, tables: Tables | None, rows: int) -> str:
    """A list stays a list and JSON Lines stay lines; of a table a list is made, if not long."""
    if path.suffix not in JSON_SUFFIXES and not path.is_dir():
        return ".json" if rows <= _LISTED_AT_MOST else ".jsonl"
    first = next(Reader(path, tables).pieces(), None)
    return ".json" if first is None or first.listed else ".jsonl"


def _write(
    path: Path,
    entry: Entry,
    held: set[int],
    parts: Mapping[str, Part],
    dataset_dir: Path,
    replace_files: bool,
    tables: Tables | None,
) -> bool:
    """Write both files and the entries; return whether that changed anything."""
    known = load_registry(dataset_dir)
    with tempfile.TemporaryDirectory(prefix=".split-", dir=dataset_dir) as scratch:
        written = {side: Path(scratch) / part.file.name for side, part in parts.items()}
        _fill(path, entry, held, written, tables)
        same = all(
            known.get(str(part.entry.key)) == part.entry and _equal(part.file, written[side])
            for side, part in parts.items()
        )
        if same:
            return False
        for side, part in parts.items():
            check_file(written[side], part.entry).raise_if_bad()
            if not replace_files:
                _refuse_to_replace(part, known, written[side], dataset_dir)
        for side, part in parts.items():
            with written[side].open("rb") as stream:
                os.fsync(stream.fileno())
            written[side].replace(part.file)
        fsync_folder(dataset_dir)
    write_entries(dataset_dir, {str(part.entry.key): part.entry for part in parts.values()})
    return True


def _fill(
    path: Path, entry: Entry, held: set[int], files: Mapping[str, Path], tables: Tables | None
) -> None:
    """Write the rows, in their order.

    Each has every column the entry names: one that no row of a part has stops LLaMA-Factory.
    """
    used = [column for role in entry.used_roles() if (column := entry.column(role))]
    with ExitStack() as stack:
        open_files = {
            side: stack.enter_context(file.open("w", encoding="utf-8", newline="\n"))
            for side, file in files.items()
        }
        counts = dict.fromkeys(files, 0)
        listed = next(iter(files.values())).suffix == ".json"
        for number, value in enumerate(values_of(Reader(path, tables).pieces())):
            side = "validation" if number in held else "train"
            row = {**value, **{column: None for column in used if column not in value}}
            text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
            before = ("[\n" if counts[side] == 0 else ",\n") if listed else ""
            open_files[side].write(before + text + ("" if listed else "\n"))
            counts[side] += 1
        for stream in open_files.values() if listed else ():
            stream.write("\n]\n")


def _finite(value: Any) -> Any:
    """Return a value without NaN, which tables use for what is missing."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    return [_finite(held) for held in value] if isinstance(value, list) else value


def _equal(file: Path, other: Path) -> bool:
    return file.is_file() and sha256_of(file) == sha256_of(other)


def _refuse_to_replace(
    part: Part, known: Mapping[str, Entry], written: Path, dataset_dir: Path
) -> None:
    there = known.get(str(part.entry.key))
    if part.file.exists() and not _equal(part.file, written):
        raise UsageError(
            f"{part.file} exists with other rows", hint="add --replace, or move it away"
        )
    if there is not None and there != part.entry:
        raise UsageError(
            f"{dataset_dir / REGISTRY}: {part.entry.key} is registered for {there.file_name}",
            hint="add --replace, or rename that entry",
        )
