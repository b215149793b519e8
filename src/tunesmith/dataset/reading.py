"""Bytes of a data file, or of a folder of them -> rows with their places, and every fault.

Rows come in pieces, so that a file of any size needs little memory. A JSON list and JSON
Lines (rows one after the other) are told apart by the first character, not by the name:
LLaMA-Factory hands both to the same reader. Other formats are read by the training
environment, with that very reader (`tables`).
"""

from __future__ import annotations

import codecs
import hashlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tunesmith.core import formats
from tunesmith.core.bounded import LONGEST_ROW, MOST_COLUMNS, kind_fault, open_plain
from tunesmith.core.callbacks import OnBytes
from tunesmith.core.documents import JsonObject
from tunesmith.dataset.report import Finding, Findings
from tunesmith.dataset.scan import Row, Scan

# LLaMA-Factory's FILEEXT2TYPE (extras/constants.py).
TYPES = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
JSON_SUFFIXES = tuple(suffix for suffix, kind in TYPES.items() if kind == "json")
# `chunksize` of datasets' JSON reader: it makes one table of so many bytes and the line
# they end in, and the first table of all fixes columns and types.
BATCH_BYTES = 10 << 20
_MORE_BYTES = 4 << 20  # of a list, or of bytes for the digest alone
_MARK = "\ufeff"

# Files of one type -> {"columns": ...} or {"error": ...}, then {"row": ...} each.
Tables = Callable[[Sequence[Path]], Iterator[JsonObject]]


@dataclass(frozen=True)
class Piece:
    """Rows that follow one another. `batch` counts the tables LLaMA-Factory's reader makes.

    `file` names the file when there is a folder of them; rows and lines count in it.
    """

    rows: Sequence[Row]
    batch: int
    listed: bool
    file: str | None = None


class Reader:
    """One reading of a file or folder; the attributes are final after `pieces` has ended.

    `readable` is False when LLaMA-Factory may stop while it reads; `listed` tells a JSON
    list from JSON Lines; `sha256` is None when there are no bytes (of a folder: over names
    and contents). Faults are `found`, never exceptions. `checked` is False for a format
    that needs the training environment, when none is given.
    """

    def __init__(
        self, path: Path, tables: Tables | None = None, progress: OnBytes | None = None
    ) -> None:
        self.path = path
        self.found = Findings()
        self.sha256: str | None = None
        self.readable = True
        self.listed = True
        self.checked = True
        self._tables = tables
        self._progress = progress
        self._digest = hashlib.sha256()
        self._batch = 0
        self._done, self._total = 0, 0

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows; what cannot be read becomes findings."""
        try:
            # The order is LLaMA-Factory's: as the folder gives them, hidden files included.
            folder = self.path.is_dir()
            files = list(self.path.iterdir()) if folder else [self.path]
            if not folder and (fault := kind_fault(self.path)):
                self._unread(f"{fault}, not a file", "put the rows into a file")
                return
            if folder and not self._sound_folder(files):
                return
            self._total = sum(file.stat().st_size for file in files)
            if TYPES.get(files[0].suffix, "json") == "json":
                for file in files:
                    self._digest.update(file.name.encode() if folder else b"")
                    with open_plain(file) as stream:
                        yield from _narrow(self._json(file, stream, file.name if folder else None))
            else:
                yield from _narrow(self._table(files))
            self.sha256 = self._digest.hexdigest()
        except FileNotFoundError:
            near = sorted(p.name for p in self.path.parent.glob("*.json*") if p.is_file())
            there = f"; {self.path.parent} holds {', '.join(near[:8])}" if near else ""
            self._unread("no such file", f"correct the name, or put the file there{there}")
        except OSError as error:
            self._unread(f"cannot be read: {error.strerror}", "fix its path or permissions")
        except (_LongLineError, _WideRowError) as error:
            self._unread(error.told, error.fix, error.file)

    def _unread(self, message: str, fix: str, file: str | None = None) -> None:
        self.readable = False
        self.found.add(Finding("error", message, fix, file=file))

    def _sound_folder(self, files: Sequence[Path]) -> bool:
        """Whether LLaMA-Factory takes the folder: files of one type, nothing else."""
        if not files:
            self._unread("is a folder without files", "put the data files there, all of one type")
            return False
        first = TYPES.get(files[0].suffix) if files[0].is_file() else None
        kinds = {TYPES.get(file.suffix) for file in files if file.is_file()} - {None}
        common = next(iter(kinds)) if len(kinds) == 1 else first
        for file in sorted(files):
            if not file.is_dir() and (fault := kind_fault(file)):
                self._unread(f"{fault}, not a file", "take it out of the folder", file.name)
                continue
            kind = TYPES.get(file.suffix) if file.is_file() else None
            if kind is None or len(kinds) > 1:
                what = (
                    "a folder" if file.is_dir() else f"of type {kind or file.suffix or 'unknown'}"
                )
                fix = "keep files of one type there and nothing else, hidden files included"
                self._unread(f"{what} in a folder of data ({common or 'mixed'})", fix, file.name)
        return self.readable

    def _take(self, data: bytes) -> bytes:
        self._digest.update(data)
        self._done += len(data)
        if self._progress is not None:
            self._progress(self._done, self._total)
        return data

    # JSON

    def _json(self, file: Path, stream: BinaryIO, name: str | None) -> Iterator[Piece]:
        data = stream.read(BATCH_BYTES)
        whole = len(data) < BATCH_BYTES
        # A list may be one line of any length.
        if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            data += _rest_of_line(stream, name, 0, data)
        self._take(data)
        decoder = _Decoder(shlex.quote(str(file)))
        text = decoder.decode(data, final=whole)
        marked, text = text.startswith(_MARK), text.removeprefix(_MARK)
        scan = Scan(text, named_jsonl=file.suffix == ".jsonl")
        self.listed = scan.listed
        if marked:
            self.found.add(_byte_order_mark(scan.listed, file, name))
            self.readable = self.readable and not scan.listed
        if whole:
            scan.run()
            self._note(scan, name, decoder)
            yield Piece(scan.rows, self._batch, scan.listed, name)
        elif scan.listed:
            yield from self._long_list(scan, stream, decoder, name)
        else:
            yield from self._lines(file, stream, data, text, decoder, name)
        self._batch += 1

    def _long_list(
        self, scan: Scan, stream: BinaryIO, decoder: _Decoder, name: str | None
    ) -> Iterator[Piece]:
        def more() -> str:
            data = self._take(stream.read(_MORE_BYTES))
            return decoder.decode(data, final=not data)

        scan.continues(more)
        for rows in scan.stream():
            yield Piece(rows, self._batch, True, name)
        while self._take(stream.read(_MORE_BYTES)):
            pass  # for the digest, after a fault that ended the reading
        self._note(scan, name, decoder)

    def _lines(
        self,
        file: Path,
        stream: BinaryIO,
        data: bytes,
        text: str,
        decoder: _Decoder,
        name: str | None,
    ) -> Iterator[Piece]:
        lines, rows, commas = 0, 0, False
        if file.suffix == ".json":
            self.found.add(
                Finding("warning", "JSON Lines under the name .json", "rename it to .jsonl")
            )
        while data:
            if text.strip():
                scan = Scan(text, named_jsonl=True, lines=lines, rows=rows)
                scan.listed = False
                scan.run()
                if commas:  # told once
                    scan.findings = [
                        f for f in scan.findings if "stand in no list" not in f.message
                    ]
                commas = commas or scan.commas_told
                self._note(scan, name, decoder)
                yield Piece(scan.rows, self._batch, False, name)
                rows = scan.last_number
                scan.forget()
            self._batch += 1
            lines += data.count(b"\n")
            data = self._take(_batch_of(stream, name, lines))
            text = decoder.decode(data, final=len(data) < BATCH_BYTES)

    def _note(self, scan: Scan, name: str | None, decoder: _Decoder) -> None:
        faults = [*decoder.faults(), *sorted(scan.findings, key=_by_place)]
        if name is not None:
            faults = [_in_file(fault, name) for fault in faults]
        self.found.extend(faults)
        broken = scan.broken or decoder.failed
        if broken or (scan.too_big if scan.listed else scan.refused):
            self.readable = False

    # other formats

    def _table(self, files: Sequence[Path]) -> Iterator[Piece]:
        if self._tables is None:
            self.checked = False
            return
        for file in files:
            self._digest.update(file.name.encode() if len(files) > 1 else b"")
            self._bytes_of(file, file.name if len(files) > 1 else None)
        if not self.readable:
            return
        rows: list[Row] = []
        number = 0
        for record in self._tables(files):
            if "error" in record:
                told = record["error"]
                self.readable = False
                self.found.add(
                    Finding("error", told["message"], told["fix"], line=told.get("line"))
                )
                break
            if "row" not in record:
                continue
            number += 1
            rows.append(Row(number, None, record["row"]))
            if len(rows) >= 2000:
                yield Piece(rows, 0, True)
                rows = []
        if self.readable and not number:
            self._unread("there are no rows", "write at least one row")
        yield Piece(rows, 0, True)

    def _bytes_of(self, file: Path, name: str | None) -> None:
        """Take the bytes of a table; those of text must be UTF-8."""
        decoder = _Decoder(shlex.quote(str(file)))
        text = TYPES.get(file.suffix) in ("csv", "text")
        line, length = 0, 0
        with open_plain(file) as stream:
            while data := self._take(stream.read(_MORE_BYTES)):
                if text:
                    # Of the line that this piece ends in; one that ends in it had not begun long.
                    last = data.rfind(b"\n")
                    length = length + len(data) if last < 0 else len(data) - last - 1
                    line += data.count(b"\n")
                    if length > LONGEST_ROW:
                        raise _LongLineError(line + 1, name)
                if text and not decoder.failed:
                    decoder.decode(data, final=False)
        if text and not decoder.failed:
            decoder.decode(b"", final=True)
        if decoder.failed:
            self.readable = False
            faults = decoder.faults()
            self.found.extend(faults if name is None else [_in_file(f, name) for f in faults])


class _Decoder:
    """UTF-8 bytes -> text, piece by piece; at the first other byte guess, and go on."""

    def __init__(self, name: str) -> None:
        self.failed = False
        self._name = name
        self._decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes, self._lines = 0, 0
        self._faults: list[Finding] = []

    def decode(self, data: bytes, final: bool) -> str:
        held = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            text = self._guess(held + data, error.start, final, self._bytes - len(held))
        self._bytes += len(data)
        self._lines += data.count(b"\n")
        return text

    def faults(self) -> list[Finding]:
        """Return what is new since the last call."""
        found, self._faults = self._faults, []
        return found

    def _guess(self, data: bytes, offset: int, final: bool, before: int) -> str:
        guess = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "gb18030"
        self._decoder = codecs.getincrementaldecoder(guess)()
        try:
            text = self._decoder.decode(data, final)
            fix = f"it looks like {guess}: iconv -f {guess.upper()} -t UTF-8 {self._name} > NEW"
        except UnicodeDecodeError:
            self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            text = self._decoder.decode(data, final)
            fix = "save it as UTF-8"
        if not self.failed:
            line = self._lines + data.count(b"\n", 0, offset) + 1
            message = f"not UTF-8 at byte {before + offset} (0x{data[offset]:02x})"
            self._faults.append(Finding("error", message, fix, line=line))
        self.failed = True
        return text


class _LongLineError(Exception):
    """A line of data that is longer than LONGEST_ROW: reading goes no further."""

    def __init__(self, line: int, file: str | None) -> None:
        super().__init__(line)
        self.told = f"line {line} is longer than {formats.size(LONGEST_ROW)}"
        self.fix = "is it data? one row, or one document, has to be shorter: split it"
        self.file = file


class _WideRowError(Exception):
    """A row that has more than MOST_COLUMNS keys: reading goes no further."""

    def __init__(self, row: Row, keys: int, file: str | None) -> None:
        super().__init__(row)
        self.told = f"row {row.number} has {keys} keys, at most {MOST_COLUMNS} are read"
        self.fix = "is it data? each key becomes a column"
        self.file = file


def _narrow(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces, up to a row of more columns than any data set has."""
    for piece in pieces:
        for row in piece.rows:
            if isinstance(row.value, dict) and len(row.value) > MOST_COLUMNS:
                raise _WideRowError(row, len(row.value), piece.file)
        yield piece


def _batch_of(stream: BinaryIO, name: str | None, lines: int) -> bytes:
    data = stream.read(BATCH_BYTES)
    return data + _rest_of_line(stream, name, lines, data) if data else data


def _rest_of_line(stream: BinaryIO, name: str | None, lines: int, before: bytes) -> bytes:
    """Return what follows `before` to the end of its line, the first of all being `lines` + 1."""
    rest = stream.readline(LONGEST_ROW)
    if len(rest) < LONGEST_ROW or rest.endswith(b"\n"):
        return rest
    raise _LongLineError(lines + before.count(b"\n") + 1, name)


def _byte_order_mark(listed: bool, file: Path, name: str | None) -> Finding:
    # Measured with 0.9.3: a list behind a byte order mark is not read, JSON Lines are.
    fix = rf"save as UTF-8 without it: sed -i '1s/^\xEF\xBB\xBF//' {shlex.quote(str(file))}"
    mark = "starts with a byte order mark (bytes EF BB BF)"
    return Finding("error" if listed else "warning", mark, fix, line=1, file=name)


def _in_file(fault: Finding, name: str) -> Finding:
    return Finding(
        fault.severity,
        fault.message,
        fault.fix,
        fault.row,
        fault.line,
        fault.column,
        fault.field,
        name,
    )


def _by_place(finding: Finding) -> tuple[float, int]:
    return finding.line or float("inf"), finding.column or 0


def values_of(pieces: Iterable[Piece]) -> Iterator[JsonObject]:
    """Yield the rows that are objects."""
    for piece in pieces:
        for row in piece.rows:
            if isinstance(row.value, dict):
                yield row.value
