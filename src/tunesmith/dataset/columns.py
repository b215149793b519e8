"""What holds for a file as a whole: columns named, absent, misspelt, of mixed kinds.

The rules are those of LLaMA-Factory 0.9.3 (data/parser.py, data/converter.py) and of
the reader behind it (datasets 3.6 with pyarrow): one column has one type.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.dataset.entry import ROLES, TAG_DEFAULTS, Entry
from tunesmith.dataset.report import Finding
from tunesmith.dataset.scan import Row
from tunesmith.dataset.syntax import kind_of, told

TEXT_ROLES = ("prompt", "query", "response", "system", "tools", "chosen", "rejected")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:\d\d(:\d\d)?)?Z?)?")


@dataclass(frozen=True)
class Outcome:
    """What one set of rules found.

    `kept`: rows LLaMA-Factory keeps as far as these rules see; `stops`: it ends with an
    error instead. Lengths are in characters, of sound rows only.
    """

    findings: tuple[Finding, ...]
    stops: bool
    kept: int = 0
    prompt_lengths: tuple[int, ...] = ()
    answer_lengths: tuple[int, ...] = ()


@functools.lru_cache(maxsize=4096)
def similar(key: str, wanted: str) -> bool:
    """Whether `key` looks like a misspelling of `wanted`."""
    a, b = key.strip().casefold(), wanted.casefold()
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


def check_columns(rows: Sequence[Row], entry: Entry, stage: str, again: str) -> Outcome:
    """Compare the columns of the file with those the entry names.

    `again` is the command that registers the file anew with the columns it has.
    """
    findings = list(_check_names(entry, again))
    first: dict[str, Row] = {}
    counts: dict[str, int] = {}
    for row in rows:
        for key in row.value:
            first.setdefault(key, row)
            counts[key] = counts.get(key, 0) + 1
    needed = needed_roles(entry, stage)
    used = [(role, entry.column(role)) for role in entry.used_roles()]
    known = {column for _, column in used if column}
    for role in needed:
        if entry.column(role) is None and not (role == "prompt" and entry.column("query")):
            message = f"the entry names no {role} column: LLaMA-Factory uses no row"
            findings.append(Finding("error", message, f"register it again: {again}"))
    renames = set()
    stops = False
    for role, column in used:
        if column is None or column in first:
            continue
        stops = True
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
        findings.append(
            Finding(
                "error",
                f'no row has the column "{column}", named {by} as {role}',
                fix,
                row=where.number if where else None,
                line=where.line if where else None,
                field=column,
            )
        )
    for key, row in first.items():
        if key in known or key in renames or _stands_in(key, known, rows):
            continue
        rows_told = "1 row" if counts[key] == 1 else f"{counts[key]} rows"
        findings.append(
            Finding(
                "warning",
                f'the column "{key}" ({rows_told}, here first) is ignored by LLaMA-Factory',
                "delete it, or name its role in dataset_info.json",
                row=row.number,
                line=row.line,
                field=key,
            )
        )
    return Outcome(tuple(findings), stops)


def _stands_in(key: str, known: set[str], rows: Sequence[Row]) -> bool:
    """Whether `key` is in a row for a column it resembles: the row rules tell that."""
    near = [column for column in known if similar(key, column)]
    return any(key in row.value and column not in row.value for column in near for row in rows)


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


def check_kinds(rows: Sequence[Row], listed: bool, blamed: set[tuple[int, str]]) -> Outcome:
    """Find columns that hold values of more than one kind: no row of such a file is read.

    `blamed` holds (row number, column) that have an error already.
    """
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    clashes: set[tuple[str, ...]] = set()
    findings = []
    for row in rows:
        for path, kind in _kinds(row.value, (), listed):
            first_kind, first_row = seen.setdefault(path, (kind, row.number))
            if first_kind == kind or path in clashes:
                continue
            clashes.add(path)
            column = path[0]
            if {(row.number, column), (first_row, column)} & blamed:
                continue  # the fault itself is told already
            name = ".".join(path).replace(".[]", "[]")
            findings.append(
                Finding(
                    "error",
                    f'"{name}" holds {kind} here and {first_kind} in row {first_row}: '
                    "no row of such a file can be read",
                    f'write one kind in all rows, or delete "{column}"',
                    row=row.number,
                    line=row.line,
                    field=column,
                )
            )
    return Outcome(tuple(findings), stops=bool(clashes))


def _kinds(
    value: Any, path: tuple[str, ...], listed: bool
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path, kind) for a value and all inside it; null goes with every kind."""
    if isinstance(value, float) and math.isnan(value) and listed:
        return  # pandas, which reads lists, makes it a null; pyarrow keeps the number
    kind = kind_of(value)
    if kind == "null":
        return
    if path:
        yield path, kind
    if isinstance(value, dict):
        for key, held in value.items():
            yield from _kinds(held, (*path, key), listed)
    elif isinstance(value, list):
        for held in value:
            yield from _kinds(held, (*path, "[]"), listed)


def check_dates(rows: Sequence[Row], entry: Entry) -> Outcome:
    """Find text columns of JSON Lines that hold dates only: pyarrow reads them as timestamps."""
    findings = []
    for role in TEXT_ROLES:
        column = entry.column(role)
        if role not in entry.used_roles() or column is None:
            continue
        held = [row.value[column] for row in rows if row.value.get(column) is not None]
        if held and all(isinstance(text, str) and _DATE.fullmatch(text) for text in held):
            message = (
                f'each "{column}" is a date, which the reader of .jsonl turns into a timestamp'
            )
            fix = "write the rows as a JSON list in a .json file"
            findings.append(Finding("error", message, fix, row=rows[0].number, line=rows[0].line))
    return Outcome(tuple(findings), stops=bool(findings))


def text_fault(value: Mapping[str, Any], column: str) -> str | None:
    """Return what is wrong with an optional text, or None when it is a string or null."""
    held = value.get(column)
    if held is None or isinstance(held, str):
        return None
    return f'"{column}" is {told(held)}, not a string'
