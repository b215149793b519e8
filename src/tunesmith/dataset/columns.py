"""What holds for a file as a whole: columns named, absent, misspelt, of mixed kinds.

The rules are those of LLaMA-Factory 0.9.3 (data/parser.py, data/converter.py) and of
the reader behind it (datasets 3.6 with pyarrow): one column has one type.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.bounded import MOST_COLUMNS
from tunesmith.core.documents import JsonObject
from tunesmith.dataset.entry import ROLES, TAG_DEFAULTS, Entry
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding, Severity
from tunesmith.dataset.syntax import kind_of, show, told

_OTHER_DELIMITERS = ";\t|"
TEXT_ROLES = ("prompt", "query", "response", "system", "tools", "chosen", "rejected")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:\d\d(:\d\d)?)?Z?)?")


@dataclass
class Rules:
    """What one set of row rules has found so far.

    `kept`: rows LLaMA-Factory keeps as far as these rules see; `stops`: it ends with an
    error instead. Lengths are in characters, of sound rows only.
    """

    kept: int = 0
    stops: bool = False
    prompt_lengths: array[int] = field(default_factory=lambda: array("L"))
    answer_lengths: array[int] = field(default_factory=lambda: array("L"))


@dataclass(frozen=True)
class SourcePosition:
    """Where a row is: number and line in its file, and the file when there are several."""

    row: int
    line: int | None
    file: str | None = None


@functools.lru_cache(maxsize=4096)
def similar(key: str, wanted: str) -> bool:
    """Whether `key` looks like a misspelling of `wanted`."""
    a, b = key.strip().casefold(), wanted.casefold()
    # No ratio is above what the lengths alone allow: most keys need no closer look.
    if 2 * min(len(a), len(b)) < 0.8 * (len(a) + len(b)):
        return False
    return a == b or difflib.SequenceMatcher(None, a, b).ratio() >= 0.8


def misspelt(keys: Iterable[str], wanted: str, known: Iterable[str]) -> str | None:
    """Return the first of `keys` that no role names and that looks like `wanted`."""
    named = set(known)
    return next((key for key in keys if key not in named and similar(key, wanted)), None)


def needed_roles(entry: Entry, stage: str) -> tuple[str, ...]:
    """Return the roles without which training of `stage` keeps no row."""
    if entry.formatting == "sharegpt":
        own: tuple[str, ...] = ("messages",)
    elif stage in ("sft", "kto"):
        own = ("prompt", "response")
    else:
        own = ("prompt",)
    return (*own, *{"rm": ("chosen", "rejected"), "kto": ("kto_tag",)}.get(stage, ()))


class Shapes:
    """The sets of columns that rows have: few, however long the file."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], tuple[int, SourcePosition]] = {}

    def add(self, piece: Piece) -> None:
        """Count the rows of a piece."""
        seen = self._seen
        for row in piece.rows:
            if isinstance(row.value, dict):
                keys = tuple(row.value)
                known = seen.get(keys)
                if known is None:
                    seen[keys] = (1, SourcePosition(row.number, row.line, piece.file))
                else:
                    seen[keys] = (known[0] + 1, known[1])

    def first(self) -> dict[str, SourcePosition]:
        """Return each column with the first row that has it."""
        found: dict[str, SourcePosition] = {}
        for keys, (_, place) in self._seen.items():
            for key in keys:
                found.setdefault(key, place)
        return found

    def count(self, key: str) -> int:
        """Return how many rows have a column."""
        return sum(count for keys, (count, _) in self._seen.items() if key in keys)

    def stands_in(self, key: str, known: set[str]) -> bool:
        """Whether `key` is in a row for a column it resembles: the row rules tell that."""
        near = [column for column in known if similar(key, column)]
        return any(key in keys and column not in keys for column in near for keys in self._seen)


def check_columns(
    shapes: Shapes, entry: Entry, stage: str, again: str, convert: str | None = None
) -> list[Finding]:
    """Compare the columns of the file with those the entry names.

    `again` is the command that registers the file again with the columns it has, `convert` the one
    that makes JSON Lines of a table.
    """
    findings = list(_check_names(entry, again))
    first = shapes.first()
    if len(first) > MOST_COLUMNS:
        message = f"the rows have {len(first)} different keys, at most {MOST_COLUMNS} are read"
        return [*findings, Finding("error", message, "is it data? each key becomes a column")]
    only = next(iter(first)) if len(first) == 1 else ""
    if convert is not None and any(mark in only for mark in _OTHER_DELIMITERS):
        message = f"{show(only)} is the one column: LLaMA-Factory divides cells at commas only"
        return [*findings, Finding("error", message, f"{convert} writes them anew")]
    needed = needed_roles(entry, stage)
    used = [(role, entry.column(role)) for role in entry.used_roles()]
    known = {column for _, column in used if column}
    for role in needed:
        if entry.column(role) is None and not (role == "prompt" and entry.column("query")):
            message = f"the entry names no {role} column: LLaMA-Factory uses no row"
            fix = f"register it again: {again}"
            if entry.stage() == "pt":
                fix = "it holds texts without answers: train with `stage: pt`"
            findings.append(Finding("error", message, fix))
    renames = set()
    for role, column in used:
        if column is None or column in first:
            continue
        wrong = misspelt(first, column, known)
        where = first[wrong] if wrong else None
        if wrong:
            renames.add(wrong)
            fix = f'rename "{wrong}" to "{column}"'
        elif role in needed:
            fix = f'add "{column}" to each row, or name the right column: {again}'
        else:
            fix = f"let the entry name only columns that exist: {again}"
        by = "by default" if entry.columns is None else "in dataset_info.json"
        message = f'no row has the column "{column}", named {by} as {role}'
        findings.append(_at(where, "error", message, fix, column))
    for key, place in first.items():
        if key in known or key in renames or shapes.stands_in(key, known):
            continue
        count = shapes.count(key)
        rows_told = "1 row" if count == 1 else f"{count} rows"
        message = f'the column "{key}" ({rows_told}, here first) is ignored by LLaMA-Factory'
        fix = "delete it, or name its role in dataset_info.json"
        findings.append(_at(place, "warning", message, fix, key))
    return findings


def _at(
    place: SourcePosition | None, severity: Severity, message: str, fix: str, column: str
) -> Finding:
    if place is None:
        return Finding(severity, message, fix, field=column)
    return Finding(severity, message, fix, place.row, place.line, field=column, file=place.file)


def _check_names(entry: Entry, again: str) -> Iterator[Finding]:
    """Roles and tags that LLaMA-Factory does not know: it passes over them in silence."""
    for name, given, known in (
        ("columns", entry.columns, ROLES),
        ("tags", entry.tags, tuple(TAG_DEFAULTS)),
    ):
        for role in given or {}:
            if role not in known:
                meant = difflib.get_close_matches(role, known, 1)
                fix = f'write "{meant[0]}"' if meant else f"known are {', '.join(known)}"
                message = f'"{role}" in {name} of dataset_info.json is unknown to LLaMA-Factory'
                yield Finding("error", message, fix, field=role)
    if entry.formatting == "sharegpt" and entry.tags is not None:
        for role in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
            if role not in entry.tags:
                message = f"tags are given without {role}: then it does not exist"
                yield Finding("error", message, f"register it again: {again}", field=role)


class Kinds:
    """Find columns that hold values of more than one kind: no row of such a file is read.

    In JSON Lines the first table of the reader (10 MB) fixes columns and kinds for the rest.
    Stricter than the reader in one case: after a first table of strings it turns numbers into
    text, here they are of another kind.
    """

    def __init__(self) -> None:
        self.stops = False
        self._seen: dict[tuple[str, ...], tuple[str, SourcePosition]] = {}
        self._told: set[tuple[str, ...]] = set()
        self._flat: set[tuple[Any, ...]] = set()  # shapes of rows that bring nothing new
        self._fractions: set[tuple[str, ...]] = set()  # paths of which a number is no integer
        self._columns: set[str] = set()
        self._batch = 0

    def add(self, piece: Piece, blamed: set[tuple[str | None, int, str]]) -> list[Finding]:
        """Check the rows of a piece; `blamed` holds (file, row, column) with an error already."""
        findings: list[Finding] = []
        if piece.batch != self._batch:
            self._flat.clear()
            self._batch = piece.batch
        for row in piece.rows:
            value = row.value
            if not isinstance(value, dict):
                continue
            types = tuple(map(type, value.values()))
            plain = not {dict, list, float} & set(types)
            if plain and (types, tuple(value)) in self._flat:
                continue
            if plain:
                self._flat.add((types, tuple(value)))
            place = SourcePosition(row.number, row.line, piece.file)
            for key in value:
                self._new_column(key, place, findings)
            for path, kind, fraction in _kinds(value, (), piece.listed):
                self._check(path, kind, fraction, place, blamed, findings)
        return findings

    def _check(
        self,
        path: tuple[str, ...],
        kind: str,
        fraction: bool,
        place: SourcePosition,
        blamed: set[tuple[str | None, int, str]],
        findings: list[Finding],
    ) -> None:
        if path not in self._seen and self._batch:
            self._tell(path, "its first value here, and none", place, findings)
        first_kind, first = self._seen.setdefault(path, (kind, place))
        if fraction and path not in self._fractions:
            if self._batch and path not in self._told and first_kind == kind:
                self._tell(path, "a number that is no integer, and only integers", place, findings)
            self._fractions.add(path)
        if first_kind == kind or path in self._told:
            return
        self._told.add(path)
        self.stops = True
        column = path[0]
        there = (first.file, first.row, column)
        if {(place.file, place.row, column), there} & blamed:
            return  # the fault itself is told already
        of = f"row {first.row}" if first.file == place.file else f"row {first.row} of {first.file}"
        message = (
            f'"{_dotted(path)}" holds {kind} here and {first_kind} in {of}: '
            "no row of such a file can be read"
        )
        fix = f'write one kind in all rows, or delete "{column}"'
        findings.append(_at(place, "error", message, fix, column))

    def _new_column(self, key: str, place: SourcePosition, findings: list[Finding]) -> None:
        if key not in self._columns:
            self._columns.add(key)
            if self._batch:
                self._tell((key,), "its first row here, and none", place, findings)

    def _tell(
        self, path: tuple[str, ...], what: str, place: SourcePosition, findings: list[Finding]
    ) -> None:
        if path in self._told or any(path[:n] in self._told for n in range(1, len(path))):
            return
        self._told.add(path)
        self.stops = True
        message = (
            f'"{_dotted(path)}" has {what} in the first 10 MB or the first file, from which '
            "LLaMA-Factory's reader takes columns and kinds: it stops here"
        )
        fix = "move a row that has it to the front"
        findings.append(_at(place, "error", message, fix, path[0]))


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path).replace(".[]", "[]")


def _kinds(
    value: Any, path: tuple[str, ...], listed: bool
) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yield (path, kind, no integer) for a value and all inside it; null goes with every kind."""
    fraction = isinstance(value, float)
    if fraction and math.isnan(value) and listed:
        return  # pandas, which reads lists, makes it a null; pyarrow keeps the number
    kind = kind_of(value)
    if kind == "null":
        return
    if path:
        yield path, kind, fraction
    if isinstance(value, dict):
        for key, held in value.items():
            yield from _kinds(held, (*path, key), listed)
    elif isinstance(value, list):
        for held in value:
            yield from _kinds(held, (*path, "[]"), listed)


class Dates:
    """Find text columns of JSON Lines that hold dates only: pyarrow reads them as timestamps."""

    def __init__(self, entry: Entry) -> None:
        used = entry.used_roles()
        named = [entry.column(role) for role in TEXT_ROLES if role in used]
        self._open = {column for column in named if column}
        # These reach the tokenizer as they are; the others stop the converter or hold no text.
        self._harmless = {entry.column("system"), entry.column("tools")}
        self._some: dict[str, SourcePosition] = {}

    def add(self, piece: Piece) -> None:
        """Look at the rows of a piece, until a column has another text."""
        if piece.listed or not self._open:
            return
        for row in piece.rows:
            if not isinstance(row.value, dict):
                continue
            for column in list(self._open):
                held = row.value.get(column)
                if held is None:
                    continue
                if not (isinstance(held, str) and _DATE.fullmatch(held)):
                    self._open.discard(column)
                    self._some.pop(column, None)
                elif column not in self._some:
                    self._some[column] = SourcePosition(row.number, row.line, piece.file)
            if not self._open:
                return

    @property
    def stops(self) -> bool:
        """Whether no row is kept because of a date."""
        return bool(set(self._some) - self._harmless)

    def findings(self) -> list[Finding]:
        """Return one error a column."""
        fix = "write the rows as a JSON list in a .json file"
        return [
            Finding(
                "error",
                f'each "{column}" is a date, which the reader of .jsonl turns into a timestamp',
                fix,
                row=place.row,
                line=place.line,
                file=place.file,
            )
            for column, place in self._some.items()
        ]


def text_fault(value: JsonObject, column: str) -> str | None:
    """Return what is wrong with an optional text, or None when it is a string or null."""
    held = value.get(column)
    if held is None or isinstance(held, str):
        return None
    return f'"{column}" is {told(held)}, not a string'
