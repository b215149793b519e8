"""Bytes of a data file -> rows with their lines, and every fault of its syntax.

A JSON list and JSON Lines (rows one after the other) are told apart by the first
character, not by the name: LLaMA-Factory hands both to the same reader.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

from tunesmith.dataset.report import Finding
from tunesmith.dataset.scan import Row, Scan


@dataclass(frozen=True)
class Reading:
    """The rows of a file that could be read, and what was wrong with the rest.

    `readable` is False when LLaMA-Factory may stop while it reads the file; `listed`
    tells a JSON list from JSON Lines; `sha256` is None when there are no bytes.
    """

    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    sha256: str | None
    readable: bool
    listed: bool


def read_rows(path: Path) -> Reading:
    """Read a json or jsonl file. Its faults are findings, never exceptions."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        return _unread("is a folder, not a file", "name one file, or join its files into one")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.json*") if p.is_file())
        there = f"; {path.parent} holds {', '.join(near[:8])}" if near else ""
        return _unread("no such file", f"correct the name, or put the file there{there}")
    except OSError as error:
        return _unread(f"cannot be read: {error.strerror}", "mend its path or permissions")
    text, faults = _decode(data, path)
    scan = Scan(text.removeprefix("\ufeff"), named_jsonl=path.suffix == ".jsonl")
    if text.startswith("\ufeff"):
        # Measured with 0.9.3: a list behind a byte order mark is not read, JSON Lines are.
        fix = rf"save as UTF-8 without it: sed -i '1s/^\xEF\xBB\xBF//' {shlex.quote(str(path))}"
        mark = "starts with a byte order mark (bytes EF BB BF)"
        faults.append(Finding("error" if scan.listed else "warning", mark, fix, line=1))
    scan.run()
    faulty = scan.broken or scan.too_big or any(f.severity == "error" for f in faults)
    return Reading(
        rows=tuple(scan.rows),
        findings=(*faults, *sorted(scan.findings, key=_by_place)),
        sha256=hashlib.sha256(data).hexdigest(),
        readable=not faulty and (scan.listed or not scan.refused),
        listed=scan.listed,
    )


def _unread(message: str, fix: str) -> Reading:
    return Reading((), (Finding("error", message, fix),), None, readable=False, listed=True)


def _by_place(finding: Finding) -> tuple[float, int]:
    return finding.line or float("inf"), finding.column or 0


def _decode(data: bytes, path: Path) -> tuple[str, list[Finding]]:
    """Return the text and, if it is not UTF-8, that fault; guess on to find the others too."""
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError as error:
        offset = error.start
    guess = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "gb18030"
    try:
        text = data.decode(guess)
        name = shlex.quote(str(path))
        fix = f"it looks like {guess}: iconv -f {guess.upper()} -t UTF-8 {name} > NEW"
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        fix = "save it as UTF-8"
    line = data.count(b"\n", 0, offset) + 1
    message = f"not UTF-8 at byte {offset} (0x{data[offset]:02x})"
    return text, [Finding("error", message, fix, line=line)]
