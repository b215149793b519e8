"""What a host may answer: every text of a host's is read here, or it is not used.

A host is somebody else's machine. What it says ends up in the inventory (which Ansible
templates), in commands, in paths, in sums and on the terminal. So each field declares what it
is: a pattern and a longest text, a range of numbers, a shape of JSON. What does not fit is
refused in one line that names host, field and value; nothing is guessed.

    PYTHON = Text(r"/[\\w./+@-]*", 300)
    python = PYTHON.read(AnswerSource("gpu1", "the login probe: python"), printed)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tunesmith.core import formats
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import one_line, printable, quoted

# A number of more digits than any 64-bit one has is none of ours; int() alone takes 4300, at
# a price that grows with their square.
_DIGITS = 20
_LARGEST = 1 << 63
# How deep our own JSON goes: a config in a request in an answer.
_DEEPEST = 40


@dataclass(frozen=True)
class AnswerSource:
    """Whom and what was asked: the beginning of a refusal."""

    host: str
    what: str

    def at(self, key: object) -> AnswerSource:
        """Return the place of a value inside this one."""
        part = f"[{key}]" if isinstance(key, int) else f".{one_line(str(key), 40)}"
        return replace(self, what=f"{self.what}{part}")

    def refused(self, expected: str, value: object) -> TunesmithError:
        """Return the error for a value that is not what was expected."""
        return TunesmithError(
            f"{self.host}: {self.what}: expected {expected}, the host says {quoted(value)}"
        )


class Shape(Protocol):
    """What a value of a host must be."""

    def read(self, asked: AnswerSource, value: Any) -> Any:
        """Return the value as it may be used. Raises TunesmithError when it does not fit."""
        ...


@dataclass(frozen=True)
class Text:
    """A text that a pattern describes from its first character to its last.

    `expected` says it for people.
    """

    pattern: str
    longest: int
    expected: str = "a plain text"

    def read(self, asked: AnswerSource, value: Any) -> str:
        """Return the text."""
        # Length first: a pattern must not work on what is too long anyway.
        if not isinstance(value, str) or len(value) > self.longest or not self._fits(value):
            raise asked.refused(self.expected, value)
        return value

    def _fits(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None


@dataclass(frozen=True)
class HostPath(Text):
    """An absolute path that no shell, no template and no config reads as anything else."""

    pattern: str = r"/[\w .,+@:=~()/-]*"
    longest: int = 1024
    expected: str = "an absolute path of plain characters"

    def _fits(self, value: str) -> bool:
        return super()._fits(value) and ".." not in value.split("/")


@dataclass(frozen=True)
class Words:
    """A text for people, and for nothing else: printable, and cut where it is too long."""

    longest: int = 4096

    def read(self, asked: AnswerSource, value: Any) -> str:
        """Return the text, cleaned."""
        if not isinstance(value, str):
            raise asked.refused("a text", value)
        return printable(value[: self.longest])


@dataclass(frozen=True)
class Number:
    """A whole number, of JSON or as digits."""

    low: int = 0
    high: int = _LARGEST

    def read(self, asked: AnswerSource, value: Any) -> int:
        """Return the number."""
        expected = f"a whole number from {self.low} to {self.high}"
        if isinstance(value, str) and re.fullmatch(rf"-?[0-9]{{1,{_DIGITS}}}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise asked.refused(expected, value)
        if not self.low <= value <= self.high:
            raise asked.refused(expected, value)
        return value


@dataclass(frozen=True)
class Real:
    """A number of JSON; `finite`: neither NaN nor Infinity, which a loss may be."""

    low: float = -1e300
    high: float = 1e300
    finite: bool = True

    def read(self, asked: AnswerSource, value: Any) -> float | int:
        """Return the number."""
        expected = f"a number from {self.low:g} to {self.high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise asked.refused(expected, value)
        if not math.isfinite(value):
            if self.finite:
                raise asked.refused(expected, value)
            return value
        if not self.low <= value <= self.high:
            raise asked.refused(expected, value)
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, asked: AnswerSource, value: Any) -> bool:
        """Return it."""
        if not isinstance(value, bool):
            raise asked.refused("true or false", value)
        return value


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: Sequence[str]

    def read(self, asked: AnswerSource, value: Any) -> str:
        """Return the word."""
        if not isinstance(value, str) or value not in self.words:
            raise asked.refused(f"one of {', '.join(self.words)}", value)
        return value


@dataclass(frozen=True)
class Maybe:
    """Null, or what `shape` says."""

    shape: Shape

    def read(self, asked: AnswerSource, value: Any) -> Any:
        """Return None or the value."""
        return None if value is None else self.shape.read(asked, value)


@dataclass(frozen=True)
class Each:
    """A list, each item of one shape."""

    shape: Shape
    most: int = 10_000

    def read(self, asked: AnswerSource, value: Any) -> list[Any]:
        """Return the list."""
        if not isinstance(value, list):
            raise asked.refused("a list", value)
        if len(value) > self.most:
            raise asked.refused(f"at most {self.most} items", f"{len(value)} items")
        return [self.shape.read(asked.at(i), item) for i, item in enumerate(value)]


@dataclass(frozen=True)
class Named:
    """An object whose keys are data: names of one shape, values of another."""

    key: Shape
    value: Shape
    most: int = 10_000

    def read(self, asked: AnswerSource, value: Any) -> JsonObject:
        """Return the mapping."""
        if not isinstance(value, dict):
            raise asked.refused("an object", value)
        if len(value) > self.most:
            raise asked.refused(f"at most {self.most} keys", f"{len(value)} keys")
        return {
            self.key.read(AnswerSource(asked.host, f"a key of {asked.what}"), key): self.value.read(
                asked.at(key), item
            )
            for key, item in value.items()
        }


@dataclass(frozen=True)
class Free:
    """Any JSON of bounded depth, whose texts are printable: for what is only shown or kept."""

    deepest: int = _DEEPEST

    def read(self, asked: AnswerSource, value: Any) -> Any:
        """Return the value, cleaned."""
        if isinstance(value, str):
            return printable(value)
        if isinstance(value, dict | list) and not self.deepest:
            raise asked.refused(f"JSON of at most {_DEEPEST} levels", "a deeper one")
        inner = Free(self.deepest - 1)
        if isinstance(value, dict):
            return {printable(key): inner.read(asked, item) for key, item in value.items()}
        if isinstance(value, list):
            return [inner.read(asked, item) for item in value]
        return value


@dataclass(frozen=True)
class Record:
    """An object with known keys: those that must be there, and those that may.

    Keys beside them come with a newer host and are read as `Free`.
    """

    must: Mapping[str, Shape] = field(default_factory=dict)
    may: Mapping[str, Shape] = field(default_factory=dict)

    def read(self, asked: AnswerSource, value: Any) -> JsonObject:
        """Return the object."""
        if not isinstance(value, dict):
            raise asked.refused("an object", value)
        missing = [key for key in self.must if key not in value]
        if missing:
            raise asked.refused(f"an object with {missing[0]!r}", value)
        shapes = {**self.must, **self.may}
        return {
            printable(key): shapes.get(key, Free()).read(asked.at(key), item)
            for key, item in value.items()
        }


class MalformedError(TunesmithError):
    """What should be JSON is none: cut off, or somebody else's words."""


def parse_json(asked: AnswerSource, text: str, longest: int = 1 << 20) -> Any:
    """Return what a host's JSON says. Raises MalformedError for what is none, TunesmithError for
    more than is read.

    NaN and Infinity are taken: a loss may be one. Whole numbers are bounded, and so is what
    nests.
    """
    if len(text) > longest:
        raise asked.refused(f"at most {formats.size(longest)} of JSON", formats.size(len(text)))
    try:
        return json.loads(text, parse_int=_bounded)
    except json.JSONDecodeError as error:
        said = f"{asked.host}: {asked.what}: not JSON ({error}): {quoted(text, 60)}"
        raise MalformedError(said) from None
    except (ValueError, RecursionError) as error:
        why = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        said = f"{asked.host}: {asked.what}: JSON that is not read on ({why}): {quoted(text, 60)}"
        raise TunesmithError(said) from None


def _bounded(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def fields(asked: AnswerSource, lines: Iterable[str], shapes: Mapping[str, Shape]) -> JsonObject:
    """Return the values of `key=value` lines; a key that is said twice counts once, the last.

    Only the known keys are taken. Raises TunesmithError for a value that does not fit.
    """
    found: JsonObject = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if equals and key in shapes:
            found[key] = shapes[key].read(AnswerSource(asked.host, f"{asked.what}: {key}"), value)
    return found


HOST_PATH = HostPath()
# An interpreter's path goes into the inventory: no blank, nothing that Jinja or a shell knows.
PYTHON = Text(
    r"/(?!.*(?:^|/)\.\.(?:/|$))[A-Za-z0-9_./+@-]*[A-Za-z0-9_+-]",
    300,
    "an absolute path of an interpreter",
)
DIGEST = Text(r"[0-9a-f]{64}", 64, "a sha256")
WORD = Text(r"[A-Za-z0-9_][\w.:+-]*", 200, "a word")
# As a run's folder is named: no separator, no leading dot or dash.
RUN_ID = Text(r"[^\W_][\w.+@=,-]*", 128, "a run id")
