"""What the probe printed: read by declared keys, or refused in one line that names the key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import printable
from tunesmith.hosts.answers import (
    HOST_PATH,
    AnswerSource,
    HostPath,
    Number,
    OneOf,
    Shape,
    Text,
    Words,
)

_BEGIN = "tunesmith_probe=2"
# Nothing at all is always allowed: the host could not tell. A text for people is cut where it is
# too long, so its shape is `WORDS`.
NUMBER = Number(-(1 << 63), 1 << 63)
COUNT = Number()
YES_NO = OneOf(("yes", "no"))
PATH = HostPath(rf"-?|{HOST_PATH.pattern}")
SECONDS = Text(r"\d{1,9}(\.\d{1,6})?", 16, "seconds")
WORDS = Words(2000)
# How often a key may come, where its section does not say.
_OFTEN = 1000
_ESCAPE = re.compile(r"%(25|0A|0D)")
_ESCAPES = {"25": "%", "0A": "\n", "0D": "\r"}


class Section(Protocol):
    """A part of the answer: a frozen dataclass that reads the values of its keys.

    `SECTION` is its name in main.sh, `SHAPES` says what each key's values must be, and `OFTEN`
    how often a key may come where that is more than a thousand times.
    """

    SECTION: ClassVar[str]
    SHAPES: ClassVar[Mapping[str, Shape]]

    @classmethod
    def read(cls, answer: Answer) -> Section:
        """Return the section. Raises TunesmithError for values that no host has."""
        ...


S = TypeVar("S", bound=Section)


class TruncatedError(TunesmithError):
    """The answer does not come to its end."""


class Answer:
    """The values by key: each has the shape that its section declares for it.

    Raises TruncatedError when the text is not whole, TunesmithError for a value that is not what
    its key says. What stands before the first line is none of ours.
    """

    def __init__(self, text: str, host: str, sections: Sequence[type[Section]]) -> None:
        self.host = host
        self._sections = tuple(sections)
        self._shapes = {key: (s, shape) for s in sections for key, shape in s.SHAPES.items()}
        self._values: dict[str, list[str]] = {}
        lines = [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
        if _BEGIN not in lines or not lines[-1].startswith("end="):
            shown = [clean(line[: WORDS.longest]) for line in lines[-3:]]
            raise TruncatedError(
                f"{host}: its answer to the probe is truncated", shown, hint="try again"
            )
        for line in lines[lines.index(_BEGIN) + 1 : -1]:
            key, equals, value = line.partition("=")
            if equals and key in self._shapes:
                self._take(key, _ESCAPE.sub(lambda found: _ESCAPES[found[1]], value).strip())
        seconds = lines[-1].removeprefix("end=")
        self.seconds = float(SECONDS.read(self.source("end"), seconds))

    def of(self, section: type[S]) -> S:
        """Return a section that was asked for."""
        assert section in self._sections
        return section.read(self)  # type: ignore[return-value]

    def source(self, key: str) -> AnswerSource:
        """Return who says what, for an error about a key."""
        return AnswerSource(self.host, f"its answer to the probe: {key}")

    def one(self, key: str) -> str:
        """Return the first value of a key, empty where there is none."""
        assert key in self._shapes
        return self._values.get(key, [""])[0]

    def all(self, key: str) -> list[str]:
        """Return the values of a key in the order in which they came."""
        assert key in self._shapes
        return self._values.get(key, [])

    def number(self, key: str, unit: int = 1) -> int | None:
        """Return a key's number in `unit`s, None where the host could not tell."""
        value = self.one(key)
        return int(value) * unit if value else None

    def _take(self, key: str, plain: str) -> None:
        section, shape = self._shapes[key]
        values = self._values.setdefault(key, [])
        often = getattr(section, "OFTEN", _OFTEN)
        if len(values) >= often:
            raise self.source(key).refused(f"at most {often} of them", f"{often + 1}")
        if plain:
            read = shape.read(self.source(key), plain)
            plain = clean(read) if isinstance(shape, Words) else plain
        values.append(plain)


def clean(text: str) -> str:
    """Return a text as one line that cannot move a cursor."""
    line = printable(text).replace("\n", " ")
    return "".join(letter if letter.isprintable() else "?" for letter in line)
