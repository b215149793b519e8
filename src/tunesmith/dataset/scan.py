"""Step through a JSON list, or through JSON Lines, row by row, and keep every fault.

A text is whole, or the beginning of a long one; then only a window of it is in memory.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tunesmith.core import formats
from tunesmith.core.bounded import DEEPEST, LONGEST_ROW, depth_at
from tunesmith.core.documents import JsonObject
from tunesmith.dataset.report import Finding
from tunesmith.dataset.syntax import excerpt, explain, kind_of

_COMMAS = re.compile(r"(?:\s*,)+")
_SPACE = re.compile(r"[ \t\r\n]*")
# Strings are skipped whole. JSON allows no line break in one, so a string that is not
# closed misleads the search on its own line only.
_STRING_OR_TRAILING_COMMA = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"?|,(?=[ \t\r\n]*[\]}])')
_LOOK_AHEAD = 1 << 20  # characters that should follow the place of reading
_TOO_LONG = f"a row of more than {formats.size(LONGEST_ROW)}"
_REFILL = 8 << 20  # characters in the window after more was read
_BATCH = 2000  # rows handed on at once


@dataclass(frozen=True)
class Row:
    """One value of the file; `number` and `line` (of its first character) count from 1.

    `line` is None where a format has no lines.
    """

    number: int
    line: int | None
    value: Any


class Scan:
    """The rows of a text and its faults of syntax; `run` fills both.

    `listed` tells a JSON list from rows written one after the other. `broken`: the text
    is not JSON. `refused`: it is, but the reader of JSON Lines behind LLaMA-Factory
    (pyarrow) stops at it, where the reader of lists (pandas) goes on. `too_big`: a number
    stops the reader of lists.

    `lines` and `rows` before the text count for the places told; `last_number` is that
    of the last row, broken ones included.
    """

    def __init__(
        self,
        text: str,
        named_jsonl: bool,
        lines: int = 0,
        rows: int = 0,
    ) -> None:
        self.text = text
        self.named_jsonl = named_jsonl
        self.last_number = rows
        self.commas_told = False
        self._more: Callable[[], str] | None = None
        self._lines, self._columns, self._rows = lines, 0, rows
        self.rows: list[Row] = []
        self.findings: list[Finding] = []
        self.broken = False
        self.refused = False
        self.too_big = False
        self.start = self._skip(0)
        self.listed = text[self.start : self.start + 1] == "["
        self._row_starts: list[int] = []
        self._half_characters = False
        self._line_ends: list[int] = []
        self._index()
        self._repeated: list[str] = []
        self._constants: list[str] = []
        self._big: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def run(self) -> None:
        """Read all rows; after a broken one go on at the next if that can be done honestly."""
        if self.start == len(self.text):
            self._fault(0, "the file is empty", "write a list of rows: [{...}, {...}]")
            return
        self._read_rows()
        if not self.broken:
            self._check_top_level()
            return
        commas = [
            match.start()
            for match in _STRING_OR_TRAILING_COMMA.finditer(self.text)
            if match.group() == ","
        ]
        if not commas:
            return
        self.commas_told = False
        # Each trailing comma is reported once; without them the rest can be read.
        edges = zip([-1, *commas], [*commas, len(self.text)], strict=True)
        self.text = " ".join(self.text[left + 1 : right] for left, right in edges)
        for kept in (self.rows, self.findings, self._row_starts):
            kept.clear()
        self._read_rows()
        for offset in commas:
            closer = self.text[self._skip(offset)]
            row = bisect.bisect_right(self._row_starts, offset)
            number = self.rows[row - 1].number if row else None
            self._fault(offset, f"trailing comma before {closer}", "delete that comma", number)

    def continues(self, more: Callable[[], str]) -> None:
        """Say that the text is only the beginning: `more` returns what follows, "" at the end."""
        self._more = more

    def stream(self) -> Iterator[list[Row]]:
        """Read all rows of a long list, some thousand at a time; `rows` stays empty."""
        some = False
        for number, offset, value in self._values():
            line, _ = self._place(offset)
            self.rows.append(Row(number, line, value))
            self._check_row(number, line, value)
            some = True
            if len(self.rows) >= _BATCH:
                yield self.rows
                self.rows = []
        yield self.rows
        self.rows = []
        if not some and not self.broken:
            self._fault(self.start, "the list is empty", "write at least one row")

    def forget(self) -> None:
        """Let go of text and rows: the decoder's hooks refer to this object, so that only a
        garbage collection would free them."""
        self.text, self.rows, self._line_ends, self._row_starts = "", [], [], []

    def _read_rows(self) -> None:
        for number, offset, value in self._values():
            line, _ = self._place(offset)
            self.rows.append(Row(number, line, value))
            self._row_starts.append(offset)
            self._check_row(number, line, value)

    def _index(self) -> None:
        self._line_ends = [match.start() for match in re.finditer("\n", self.text)]
        if re.search(r"\\u[dD][89a-fA-F]", self.text):
            self._half_characters = True

    def _refill(self, position: int) -> int:
        """Drop the text before `position` and append more; return the new position."""
        if self._more is None:
            return position
        ended = bisect.bisect_left(self._line_ends, position)
        if ended:
            self._columns = position - self._line_ends[ended - 1] - 1
        else:
            self._columns += position
        self._lines += ended
        parts = [self.text[position:]]
        wanted = max(2 * len(parts[0]), _REFILL)
        held = len(parts[0])
        while held < wanted:
            part = self._more()
            if not part:
                self._more = None
                break
            parts.append(part)
            held += len(part)
        self.text = "".join(parts)
        self._index()
        return 0

    def _check_top_level(self) -> None:
        if not self.rows:
            self._fault(self.start, "the list is empty", "write at least one row")
        elif self.listed or self.named_jsonl:
            return
        elif len(self.rows) > 1:
            self.findings.append(
                Finding("warning", "JSON Lines under the name .json", "rename it to .jsonl")
            )
        else:
            value = self.rows.pop().value
            fix = "put [ before it and ] after it"
            inner = value.items() if isinstance(value, dict) else ()
            for key, held in inner:
                if isinstance(held, list) and held and kind_of(held[0]) == "object":
                    fix = f'write the list under "{key}" alone'
            message = f"the top level is one {kind_of(value)}, not a list of rows"
            self._fault(self.start, message, fix)

    def _values(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (row number, offset, value); what stands in the way becomes a fault."""
        position = self.start + self.listed
        number, row_before, comma_before = self._rows, False, False
        while True:
            if self._more is not None and len(self.text) - position < _LOOK_AHEAD:
                position = self._refill(position)
            position = self._skip(position)
            char = self.text[position : position + 1]
            if not char:
                if self.listed:
                    end = len(self.text.rstrip()) - 1
                    self._fault(end, "the file ends inside the list", "is it cut off? add ]")
                return
            if char == "]" and self.listed:
                if comma_before:
                    self._fault(position, "trailing comma before ]", "delete that comma")
                rest = self._skip(position + 1)
                if rest < len(self.text):
                    told = f"text after the end of the list: {excerpt(self.text, rest)}"
                    self._fault(rest, told, "delete it")
                return
            if char == ",":
                if not self.listed and not self.commas_told:
                    told = "a comma between rows that stand in no list"
                    self._fault(position, told, "put [ and ] around all rows, or delete the commas")
                    self.commas_told = True
                elif self.listed and not row_before:
                    # Of a run of them the first is told, and none looked at again.
                    self._fault(position, "a comma too many", "delete it")
                    run = _COMMAS.match(self.text, position)
                    position = run.end() - 1 if run else position
                position, row_before, comma_before = position + 1, False, True
                continue
            number += 1
            self.last_number = number
            if self.listed and row_before and char in '{["':
                self._fault(position, "a comma is missing before this row", "add it", number)
            self._repeated.clear()
            self._constants.clear()
            self._big.clear()
            try:
                value, end = self._decoder.raw_decode(self.text, position)
            except (json.JSONDecodeError, RecursionError) as error:
                if self._cut_off(error, position):
                    number, row_before = number - 1, False
                    position = self._refill(position)
                    continue
                if isinstance(error, RecursionError) or len(self.text) - position < LONGEST_ROW:
                    at, message, fix = explain(self.text, position, error)
                else:
                    at, message, fix = position, _TOO_LONG, "is it data? split the row"
                self._fault(at, message, fix, number)
                following = self._next_row(position)
                if following is None:
                    return
                position, row_before, comma_before = following, False, False
                continue
            if (depth := depth_at(self.text, position, end)) > DEEPEST:
                told = f"lists or objects nested {depth} deep, at most {DEEPEST} are read"
                self._fault(position, told, "flatten the value", number)
            else:
                yield number, position, value
            position, row_before, comma_before = end, True, False

    def _cut_off(self, error: json.JSONDecodeError | RecursionError, position: int) -> bool:
        """Whether the row may go on behind the window of a long text."""
        if self._more is None or isinstance(error, RecursionError):
            return False
        near_end = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated")
        return near_end and len(self.text) - position < LONGEST_ROW

    def _next_row(self, position: int) -> int | None:
        """Return where the row after the broken one starts, or None with a note.

        That is plain only when rows begin their lines: at the next { of the same indent.
        """
        before = self.text[self.text.rfind("\n", 0, position) + 1 : position]
        if not before.strip(" \t["):
            indent = "" if "[" in before else before
            match = re.compile(rf"^{indent}\{{", re.MULTILINE).search(self.text, position + 1)
            if match is not None:
                return match.end() - 1
        self.findings.append(Finding("note", "rows after the last broken one were not checked", ""))
        return None

    def _check_row(self, number: int, line: int, value: Any) -> None:
        def found(message: str, fix: str, key: str | None = None) -> None:
            self.findings.append(Finding("error", message, fix, row=number, line=line, field=key))

        for key in dict.fromkeys(self._repeated):
            self.refused = True
            found(f'the key "{key}" stands twice in one object', "delete one of the two", key)
        for name in dict.fromkeys(self._constants):
            found(f"{name} cannot be read", "write a string or null, or delete the key")
        for name in dict.fromkeys(self._big):
            if self.listed:
                found(f"{name} cannot be read", "write a string or null, or delete the key")
            else:  # measured: pyarrow rounds it, pandas stops
                fix, told = "write it as a string", f"{name} is read as a rounded one"
                self.findings.append(Finding("warning", told, fix, row=number, line=line))
        if self._half_characters:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                self.refused = True
                found(r"half a character (a lone \ud800 to \udfff)", "write the whole character")

    def _fault(self, offset: int, message: str, fix: str, row: int | None = None) -> None:
        self.broken = True
        line, column = self._place(offset)
        self.findings.append(Finding("error", message, fix, row=row, line=line, column=column))

    def _skip(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        assert match is not None, "the pattern matches the empty text too"
        return match.end()

    def _place(self, offset: int) -> tuple[int, int]:
        line = bisect.bisect_left(self._line_ends, offset)
        before = self._line_ends[line - 1] if line else -1 - self._columns
        return self._lines + line + 1, offset - before

    def _object(self, pairs: list[tuple[str, Any]]) -> JsonObject:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [key for key, _ in pairs]
            self._repeated.extend(key for key in value if names.count(key) > 1)
        return value

    def _constant(self, name: str) -> float:
        self._constants.append(name)
        return float(name)

    def _integer(self, digits: str) -> int | float:
        # int() refuses more than 4300 digits with an error that names no place.
        number = int(digits) if len(digits) < 100 else float(digits)
        if not -(2**63) <= number < 2**63:
            self.too_big = True
            self._big.append(f"a number of {len(digits)} digits")
        return number
