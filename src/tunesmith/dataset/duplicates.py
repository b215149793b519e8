"""Rows that are the same, by a hash of 64 bits a row: 16 bytes of memory, any file length."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.columns import SourcePosition
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding, Findings


class Places:
    """Where each row is, for rows counted through all files."""

    def __init__(self) -> None:
        self._lines = array("q")
        self._numbers = array("L")
        self._starts: list[int] = []
        self._files: list[str | None] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, number: int, line: int | None, file: str | None) -> None:
        """Count one more row."""
        if not self._files or self._files[-1] != file:
            self._starts.append(len(self._lines))
            self._files.append(file)
        self._lines.append(-1 if line is None else line)
        self._numbers.append(number)

    def place(self, ordinal: int) -> SourcePosition:
        """Return the place of the row counted `ordinal`, from 0."""
        line = self._lines[ordinal]
        file = self._files[bisect_right(self._starts, ordinal) - 1]
        return SourcePosition(self._numbers[ordinal], None if line < 0 else line, file)


class Duplicates:
    """Rows of the same columns and values, key order aside.

    Two rows count as the same when Python's keyed 64-bit hash of them is: by chance that
    happens once in 40 million files of a million rows.
    """

    def __init__(self) -> None:
        self.again: set[int] = set()  # rows, counted from 0, known after `findings`
        self._hashes = array("q")
        self._places = Places()

    def add(self, piece: Piece) -> None:
        """Take the rows of a piece."""
        for row in piece.rows:
            if isinstance(row.value, dict):
                self._hashes.append(hash_of(row.value))
                self._places.add(row.number, row.line, piece.file)

    def findings(self) -> Findings:
        """Return one warning for each row that is the same as one before."""
        found = Findings()
        for before, again in self._pairs():
            first, place = self._places.place(before), self._places.place(again)
            message = f"the same as {told_place(first)}"
            found.add(
                Finding("warning", message, "delete one", place.row, place.line, file=place.file)
            )
            self.again.add(again)
        return found

    def _pairs(self) -> Iterator[tuple[int, int]]:
        first: dict[int, int] = {}
        for ordinal, value in enumerate(self._hashes):
            before = first.setdefault(value, ordinal)
            if before != ordinal:
                yield before, ordinal


def hash_of(value: JsonObject) -> int:
    """Return a hash of a row, the same for the same content in this process."""
    # JSON tells 1 from 1.0 and true, which are equal to Python; text alone needs no JSON.
    if all(type(held) is str for held in value.values()):
        return hash(tuple(sorted(value.items())))
    return hash(json.dumps(value, sort_keys=True))


def told_place(place: SourcePosition) -> str:
    """Return a place for a message: row 3 (line 5)."""
    line = "" if place.line is None else f" (line {place.line})"
    return f"row {place.row}{line}" + ("" if place.file is None else f" of {place.file}")
