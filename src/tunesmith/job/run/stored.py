"""Read a file of a run that a crash, a full disk or another machine may have damaged.

A damaged file is one error with the file, the place and the way out of it, never a traceback.
Standard library and yaml only.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.core.bounded import DEEPEST, MOST_OF_YAML
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.job.run.codec import decode

T = TypeVar("T")

# No JSON file of a run comes near it.
LARGEST = 64 * 1024 * 1024
# Aliases of YAML let a few lines stand for more values than any memory holds.
_MOST_VALUES = 1_000_000
_HALF = re.compile(r"\\[uU](?:0000)?[dD][89a-fA-F]")


class DamagedError(UsageError):
    """A file cannot be read as what it should be. Nothing was started or changed."""

    def __init__(self, path: Path, why: str, remedy: str) -> None:
        super().__init__(f"{path}: damaged: {why}; {remedy}")
        self.path, self.why = path, why


def read_record(path: Path, kind: type[T], remedy: str) -> T:
    """Return what the JSON object of a file says.

    Raises FileNotFoundError where there is none, DamagedError ending in `remedy` for a file
    that is not JSON, or whose object is no `kind`.
    """
    content = read_plain(path, remedy)
    try:
        return decode(kind, parse_json(content))
    except ValueError as error:
        raise DamagedError(path, str(error), remedy) from None


def read_mapping(path: Path, remedy: str) -> JsonObject:
    """Return the mapping of a YAML file; raises as `read_record` does."""
    import yaml  # here: who reads no YAML must not wait for it

    content = read_plain(path, remedy, MOST_OF_YAML)
    try:
        text = content.decode()
        value = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise DamagedError(path, f"not UTF-8 at byte {error.start}", remedy) from None
    except RecursionError:
        raise DamagedError(path, "nested too deeply", remedy) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
        raise DamagedError(path, f"not YAML{place}: {problem}", remedy) from None
    if fault := _extent_fault(value):
        raise DamagedError(path, fault, remedy)
    if _HALF.search(text) and not _is_writable(value):
        raise DamagedError(path, "holds half a character", remedy)
    if not isinstance(value, dict):
        raise DamagedError(path, f"holds {_kind(value)}, not an object", remedy)
    if other := [key for key in value if not isinstance(key, str)]:
        raise DamagedError(path, f"expected text as key, found {ascii(other[0])[:40]}", remedy)
    return value


def parse_json(content: bytes) -> Any:
    """Return what JSON says. Raises ValueError naming the byte, or that it is nested too deeply."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if not text.strip("\0 \n"):
        raise ValueError("empty")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode())
        raise ValueError(f"not JSON at byte {at}: {error.msg}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Of few lists and objects none is deep.
    if text.count("[") + text.count("{") > DEEPEST and (fault := _extent_fault(value)):
        raise ValueError(fault)
    if _HALF.search(text) and not _is_writable(value):
        raise ValueError("holds half a character")
    return value


def _is_writable(value: Any) -> bool:
    """Whether UTF-8 can hold the texts of a value: escapes can spell half a character."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _extent_fault(value: Any) -> str:
    """Return why a value is more than may be walked through and written out, "" if it is not."""
    level, count = [value], 0
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                count += len(item)
                if count > _MOST_VALUES:
                    return f"more than {_MOST_VALUES} values"
                below += item.values() if isinstance(item, dict) else item
        if not below:
            return ""
        level = below
    return "nested too deeply"


def read_plain(path: Path, remedy: str, most: int = LARGEST) -> bytes:
    """Return the bytes of a plain file, `most` at most; raises as `read_record` does for
    anything else.

    A symbolic link to a plain file is one, as everywhere; a pipe would be waited for.
    """
    try:
        # Without O_NONBLOCK the open itself waits for a pipe's other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(path, f"cannot be read ({error.strerror})", remedy) from None
    with os.fdopen(descriptor, "rb") as stream:
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError(path, "not a plain file", remedy)
            if status.st_size > most:
                raise DamagedError(path, f"{status.st_size} bytes long", remedy)
            return stream.read(most)
        except OSError as error:
            raise DamagedError(path, f"cannot be read ({error.strerror})", remedy) from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", type(None): "nothing", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
