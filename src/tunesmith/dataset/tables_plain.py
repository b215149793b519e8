"""Cells of a CSV or TSV file as the text that stands in them.

LLaMA-Factory reads tables with pandas, which makes a number of "007", nothing of "NA", "null" and
"None", and takes a comma for the only delimiter.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.bounded import LONGEST_ROW, open_plain
from tunesmith.core.errors import UsageError

_DELIMITERS = ",;\t|"
# In the order they are tried; the last takes any bytes.
_ENCODINGS = ("utf-8-sig", "utf-16", "gb18030", "latin-1")
_LARGEST = 2 << 30


@dataclass(frozen=True)
class Table:
    """The rows of a table by column name, and how the file was written."""

    rows: list[dict[str, str]]
    delimiter: str
    encoding: str
    # Rows with more or fewer cells than the head: numbers from 1.
    ragged: list[int]


def read_table(file: Path) -> Table:
    """Return the rows of a CSV or TSV file. Raises UsageError for a file without any."""
    with open_plain(file) as stream:
        content = stream.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise UsageError(f"{file}: more than 2 GB", hint="split the file")
    text, encoding = _decoded(content)
    head = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=lambda mark: (_outside_quotes(head, mark), mark == ","))
    csv.field_size_limit(LONGEST_ROW)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=False))
    except csv.Error as error:
        raise UsageError(f"{file}: not a table: {error}") from None
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    if len(lines) < 2:
        raise UsageError(f"{file}: a table has a line of column names and at least one row")
    names = [name.strip() for name in lines[0]]
    if len(set(names)) != len(names) or not all(names):
        raise UsageError(
            f"{file}: line 1: column names must be there and differ, found {', '.join(names)}",
            hint="write one name for each column",
        )
    ragged = [number for number, line in enumerate(lines[1:], 1) if len(line) != len(names)]
    rows = [dict(zip(names, [*line, *[""] * len(names)], strict=False)) for line in lines[1:]]
    return Table(rows, delimiter, encoding, ragged)


def _decoded(content: bytes) -> tuple[str, str]:
    for encoding in _ENCODINGS:
        if encoding == "utf-16" and content[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            continue
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 takes any bytes")


def _outside_quotes(line: str, mark: str) -> int:
    return sum(part.count(mark) for part in line.split('"')[::2])
