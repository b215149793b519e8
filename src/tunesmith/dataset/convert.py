"""A data file of another tool -> JSON Lines that LLaMA-Factory reads, beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_text
from tunesmith.dataset import exports
from tunesmith.dataset.reading import JSON_SUFFIXES, Reader
from tunesmith.dataset.tables_plain import read_table

_TABLES = (".csv", ".tsv")
_SHEETS = (".xlsx", ".xls", ".ods", ".numbers")


@dataclass(frozen=True)
class Conversion:
    """What a file was, the rows made of it, and what was changed: (what, how often)."""

    kind: str
    rows: list[JsonObject]
    changes: tuple[tuple[str, int], ...]


def convert(file: Path) -> Conversion:
    """Return the rows that a file of another tool holds. Writes nothing.

    Raises UsageError for a file that needs none of it, or that cannot be read.
    """
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    if file.suffix.casefold() in _SHEETS:
        raise UsageError(
            f"{file}: a spreadsheet",
            hint="save it as CSV UTF-8 in the program that made it, then convert that",
        )
    if file.suffix.casefold() in _TABLES:
        return _from_table(file)
    if file.suffix not in JSON_SUFFIXES:
        raise UsageError(
            f"{file}: {', '.join((*_TABLES, *JSON_SUFFIXES))} files can be converted, not "
            f"{file.suffix or 'a file without a suffix'}"
        )
    notes: Counter[str] = Counter()
    rows: list[JsonObject] = []
    kind, values = None, _values(file)
    for value in values:
        kind = kind or exports.kind_of(value)
        if kind is None:
            raise UsageError(
                f"{file}: not an export that is known ({', '.join(exports.READERS)}); it may be "
                "fine as it is",
                hint=f"inv data.check --file {file}",
            )
        rows += exports.READERS[kind](value, lambda text: notes.update([text]))
    if not rows or kind is None:
        told = [f"{what} ({number})" for what, number in notes.items()]
        raise UsageError(f"{file}: no row can be made of it", told)
    return Conversion(kind, rows, tuple(notes.most_common()))


def write(file: Path, conversion: Conversion, *, replace: bool = False) -> Path:
    """Write the rows beside the file, under its name with .jsonl, and return where.

    Raises UsageError where something is there already, unless `replace`.
    """
    name = file.stem if file.suffix != ".jsonl" else f"{file.stem}_converted"
    made = file.with_name(f"{name}.jsonl")
    if made.exists() and not replace:
        raise UsageError(f"{made}: is there already", hint="--replace writes it again")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in conversion.rows]
    write_text(made, "".join(lines))
    return made


def _from_table(file: Path) -> Conversion:
    table = read_table(file)
    changes = []
    if table.encoding not in ("utf-8-sig", "utf-8"):
        changes.append((f"read as {table.encoding}, written as UTF-8", len(table.rows)))
    if table.ragged:
        shown = ", ".join(map(str, table.ragged[:5]))
        changes.append((f"rows with more or fewer cells than columns: {shown}", len(table.ragged)))
    emptied = sum(not cell.strip() for row in table.rows for cell in row.values())
    if emptied:
        changes.append(("empty cells became empty texts", emptied))
    kind = {",": "CSV", "\t": "TSV"}.get(table.delimiter, f"CSV with {table.delimiter}")
    rows: list[JsonObject] = list(table.rows)
    if rows and exports.kind_of(rows[0]) == "KTO":
        notes: Counter[str] = Counter()
        rows = [
            made
            for row in rows
            for made in exports.READERS["KTO"](row, lambda text: notes.update([text]))
        ]
        changes += notes.most_common()
    return Conversion(kind, rows, tuple(changes))


def _values(file: Path) -> Iterator[Any]:
    reader = Reader(file)
    for piece in reader.pieces():
        for row in piece.rows:
            # ChatGPT's and other exports are one document or a list of them.
            yield row.value
    errors = [finding for finding in reader.found.held if finding.severity == "error"]
    if not reader.readable and errors:
        raise UsageError(f"{file}: {errors[0].message}", hint=errors[0].fix)
