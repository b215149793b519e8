"""What a value read from a file may look like, and in which place it does not.

A check takes a value and the name of its place ("model.files"), and returns the fault in words,
or None. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

Check = Callable[[Any, str], "str | None"]

# Beyond it arithmetic and formatting of floats end in errors; no figure of a run is as large.
_LARGEST = 1e18


def anything(_value: Any, _at: str) -> str | None:
    """Take every value."""
    return None


def text(value: Any, at: str) -> str | None:
    """Take a text."""
    return None if isinstance(value, str) else _expected("text", value, at)


def flag(value: Any, at: str) -> str | None:
    """Take true or false."""
    return None if isinstance(value, bool) else _expected("true or false", value, at)


def whole(value: Any, at: str) -> str | None:
    """Take a whole number of an ordinary size."""
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST
    return None if fits else _expected("a whole number", value, at)


def count(value: Any, at: str) -> str | None:
    """Take a whole number from 0 on."""
    return whole(value, at) or (None if value >= 0 else _expected("0 or more", value, at))


def number(value: Any, at: str) -> str | None:
    """Take a number; a loss may be NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return finite(value, at)


def finite(value: Any, at: str) -> str | None:
    """Take a finite number of an ordinary size."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = plain and math.isfinite(value) and abs(value) < _LARGEST if _small(value) else False
    return None if fits else _expected("a number", value, at)


def _small(value: Any) -> bool:
    # math.isfinite() of an int too large for a float raises.
    return not isinstance(value, int) or abs(value) < _LARGEST


def matching(pattern: str, words: str) -> Check:
    """Return a check for text that matches as a whole; `words` say what is expected."""
    grammar = re.compile(pattern)

    def check(value: Any, at: str) -> str | None:
        fits = isinstance(value, str) and grammar.fullmatch(value) is not None
        return None if fits else _expected(words, value, at)

    return check


def one_of(known: Collection[str]) -> Check:
    """Return a check for one of some words."""

    def check(value: Any, at: str) -> str | None:
        fits = isinstance(value, str) and value in known
        return None if fits else _expected(f"one of {', '.join(known)}", value, at)

    return check


def maybe(check: Check) -> Check:
    """Return a check that takes null too."""
    return lambda value, at: None if value is None else check(value, at)


def either(one: Check, other: Check) -> Check:
    """Return a check that takes what one of two takes."""
    return lambda value, at: one(value, at) and other(value, at)


def items(check: Check) -> Check:
    """Return a check for a list."""

    def checked(value: Any, at: str) -> str | None:
        if not isinstance(value, list):
            return _expected("a list", value, at)
        found = (check(item, f"{at}[{index}]") for index, item in enumerate(value))
        return next((fault for fault in found if fault), None)

    return checked


def each(check: Check) -> Check:
    """Return a check for an object whose values are all alike."""

    def checked(value: Any, at: str) -> str | None:
        if not isinstance(value, dict):
            return _expected("an object", value, at)
        for key, item in value.items():
            if not isinstance(key, str):
                return _expected("text as key", key, at)
            if fault := check(item, _below(at, key)):
                return fault
        return None

    return checked


def fields(known: Mapping[str, Check], needed: Collection[str] = ()) -> Check:
    """Return a check for an object: what is `known` is checked where it is there, what is
    `needed` must be there, and other keys may hold anything."""

    def checked(value: Any, at: str) -> str | None:
        if not isinstance(value, dict):
            return _expected("an object", value, at)
        for key in needed:
            if key not in value:
                return f"{_below(at, key)} is missing"
        for key, check in known.items():
            if key in value and (fault := check(value[key], _below(at, key))):
                return fault
        return None

    return checked


def _name(value: Any) -> str:
    names = {list: "a list", dict: "an object", int: "a number out of range"}
    return names.get(type(value), type(value).__name__)


def _below(at: str, key: str) -> str:
    key = key if key.isidentifier() else ascii(key)[:60]
    return f"{at}.{key}" if at else key


def _expected(wanted: str, value: Any, at: str) -> str:
    plain = value is None or isinstance(value, (bool, float, str)) or _small(value)
    found = ascii(value)[:40] if plain and not isinstance(value, (list, dict)) else _name(value)
    return f"{at or 'the content'} is {found}, {wanted} expected"
