"""Files of others, read with bounds. Standard library, Python 3.10.

A pipe would make us wait for ever, a line of 700 MB takes gigabytes, and a value that is nested
deep enough ends Python's own reader. Each is refused before it is met.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

# Of JSON that describes something (a config, a tokenizer, a registry). The largest tokenizers
# have 35 MB; data have no such bound.
MOST_BYTES = 64 << 20
# Of YAML that people write; reading it takes a minute for as much.
MOST_OF_YAML = 2 << 20
# Of one line or one row of data.
LONGEST_ROW = 32 << 20
# Keys of a row, and of all rows together: each becomes a column of a table.
MOST_COLUMNS = 1000
# No data and no config are nested half as deep; readers end at some hundreds.
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
    """Return what `path` (of a link: what it leads to) is instead of a file, "" for a file.

    Raises FileNotFoundError when nothing is there.
    """
    return _fault_of(path.stat().st_mode)


def open_plain(path: Path) -> BinaryIO:
    """Open a file to be read, and nothing else: what is a pipe or a device is not waited for.

    Raises OSError; for what is no file its text says what it is.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if fault := _fault_of(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{fault}, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return what a file holds. Raises OSError as `open_plain`, ValueError for more than `most`."""
    with open_plain(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        size = path.stat().st_size
        raise ValueError(f"has {size} bytes; at most {most} are read")
    return data


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the UTF-8 text of a file. Raises as `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path, most).decode("utf-8")


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return what JSON says (`options` are json.loads'). Raises ValueError, of deep nesting too."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    # Of a long text the looking would take longer than the reading.
    depth = depth_at(text) if len(text) < _SHORT else 0
    if depth <= DEEPEST:
        try:
            return json.loads(text, **options)
        except RecursionError:
            depth = depth_at(text)
    raise TooDeepError(f"lists or objects nested {depth} deep, at most {DEEPEST} are read")


def depth_at(text: str, start: int = 0, end: int | None = None) -> int:
    """Return how deep the value that begins at `start` is nested; 0 when it is certainly
    not deeper than DEEPEST. Counts to 100 000; nothing behind `end` is looked at."""
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
    return next((told for is_one, told in _KINDS if is_one(mode)), "")
