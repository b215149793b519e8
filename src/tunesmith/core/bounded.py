"""Untrusted files, read with limits. Standard library, Python 3.10.

A pipe would block forever, a line of 700 MB takes gigabytes of memory, and a deeply nested value
crashes Python's own parsers. Each is refused before it is read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

# Size of descriptive JSON (a config, a tokenizer, a registry). The largest tokenizers have 35 MB.
# Data files have no such limit.
MOST_BYTES = 64 << 20
# Size of YAML written by people; this much takes a minute to parse.
MOST_OF_YAML = 2 << 20
# Size of one line or one row of data.
LONGEST_ROW = 32 << 20
# Distinct keys of one row, and of all rows: each becomes a column of a table.
MOST_COLUMNS = 1000
# Real data and configs are not nested half as deep; parsers fail at a few hundred levels.
DEEPEST = 100
_COUNTED = 100_000
_SHORT = 1 << 20

_KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)
_BRACKET_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', re.DOTALL)


class TooDeepError(ValueError):
    """A value is nested deeper than DEEPEST."""


def kind_fault(path: Path) -> str:
    """Return what `path` (or the target of a link) is instead of a file, "" for a file.

    Raises FileNotFoundError if it does not exist.
    """
    return _fault_of(path.stat().st_mode)


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading, without blocking on a pipe or a device.

    Raises OSError, whose text says what `path` is if it is not a file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if fault := _fault_of(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{fault}, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return a file's content. Raises OSError like `open_plain`, ValueError above `most` bytes."""
    with open_plain(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        size = path.stat().st_size
        raise ValueError(f"has {size} bytes; at most {most} are read")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return a file's UTF-8 text. Raises like `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON (`options` of json.loads). Raises ValueError, also for deep nesting."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    # In a long text, counting the depth first would take longer than parsing.
    depth = depth_at(text) if len(text) < _SHORT else 0
    if depth <= DEEPEST:
        try:
            return json.loads(text, **options)
        except RecursionError:
            depth = depth_at(text)
    raise TooDeepError(f"lists or objects nested {depth} deep, at most {DEEPEST} are read")


def depth_at(text: str, start: int = 0, end: int | None = None) -> int:
    """Return the nesting depth of the value that begins at `start`, 0 if it is certainly not
    deeper than DEEPEST. Counts to 100 000 and ignores everything after `end`."""
    stop = len(text) if end is None else end
    if text.count("[", start, stop) + text.count("{", start, stop) <= DEEPEST:
        return 0
    depth = deepest = 0
    for match in _BRACKET_OR_STRING.finditer(text, start, stop):
        char = text[match.start()]
        if char in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if depth >= _COUNTED:
                break
        elif char in "]}":
            depth -= 1
            if depth <= 0:
                break
    return deepest


def _fault_of(mode: int) -> str:
    return next((fault for is_one, fault in _KINDS if is_one(mode)), "")
