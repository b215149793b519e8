"""JSON objects into frozen dataclasses and back, checked by the types of their fields.

The type of a field is its check: `Annotated[int, Between(0, 10)]`, `Literal["a", "b"]`, another
dataclass, `tuple[X, ...]` for a list, `Mapping[K, V]` for an object whose keys are data,
`X | None`. A key that the class does not know is passed over, unless the class collects it in a
field made by `rest()`, or has `REFUSES_UNKNOWN`. What does not fit is a `Fault`, which names the
place in the document: `model.files["x"].size`.

A class with a static method `variant_of` of its own is read as the class that this returns for a
document; the keys of a method `first_keys` are written before those of the fields.

`foreign=True` reads what another machine says: texts for people become printable and are cut,
lists and objects are bounded.

Decoders are made once for each class, so that reading costs about what the checks cost. Standard
library only.
"""

from __future__ import annotations

import collections.abc
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast

from tunesmith.core.printable import one_line, printable

T = TypeVar("T")
_Decoder = Callable[[Any], Any]

# Beyond it arithmetic and formatting of floats end in errors; no figure of a run is as large.
LARGEST = 10**18
# Of a foreign list or object that has no bound of its own.
_MOST = 10_000
# How deep our own JSON goes: a config in a request in an answer.
_DEEPEST = 40
_LONGEST = 4096


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`; `any_float`: or NaN or infinite, as a loss may be."""

    low: float = -LARGEST
    high: float = LARGEST
    any_float: bool = False


@dataclass(frozen=True)
class Like:
    """A text that a pattern describes from its first character to its last."""

    pattern: str
    expected: str
    longest: int


@dataclass(frozen=True)
class Prose:
    """A text for people: of a foreign one at most so many characters are kept, printable."""

    longest: int = _LONGEST


@dataclass(frozen=True)
class Exact:
    """A text that is used as it is, a file's name or a path: never cut, never cleaned."""

    longest: int = _LONGEST


@dataclass(frozen=True)
class Most:
    """A foreign list or object of at most so many items."""

    items: int


class Fault(ValueError):
    """A value is not what its place in a document expects.

    `at` is the place, "" for the document itself.
    """

    def __init__(self, expected: str, value: Any, *, missing: bool = False) -> None:
        super().__init__()
        self.expected, self.value, self.missing = expected, value, missing
        self._keys: list[str | int] = []

    def below(self, key: str | int) -> Fault:
        """Return the same fault, found below `key`."""
        self._keys.append(key)
        return self

    @property
    def at(self) -> str:
        """The place of the value in its document."""
        place = ""
        for key in reversed(self._keys):
            if isinstance(key, int):
                place += f"[{key}]"
            elif key.isidentifier() and key.isascii():
                place += f".{key[:60]}" if place else key[:60]
            else:
                place += f'["{one_line(ascii(key)[1:-1])}"]'
        return place

    def __str__(self) -> str:
        place = f"{self.at}: " if self._keys else ""
        if self.missing:
            return f"{place}{self.expected} is missing"
        return f"{place}expected {self.expected}, found {_shown(self.value)}"


def optional() -> Any:
    """Return a field that is None unless given, and is then not written."""
    return field(default=None, metadata={"omit": True})


def omitted(default: Any) -> Any:
    """Return a field that is not written while it has its default."""
    return field(default=default, metadata={"omit": True})


def omitted_mapping() -> Any:
    """Return a field of an object that is not written while it is empty."""
    return field(default_factory=dict, metadata={"omit": True})


def named(key: str, **options: Any) -> Any:
    """Return a field whose key in JSON is `key`, a word of Python's."""
    return field(metadata={"key": key}, **options)


def rest() -> Any:
    """Return a field that collects the keys no other field has."""
    return field(default_factory=dict, metadata={"rest": True})


def decode(kind: type[T], value: Any, *, foreign: bool = False) -> T:
    """Return a value of JSON as an instance of a dataclass. Raises Fault."""
    decoded: T = _decoder(cast(Hashable, kind), foreign)(value)
    return decoded


def encode(value: Any) -> Any:
    """Return an instance of a dataclass, or what holds some, as a value of JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        head = getattr(value, "first_keys", None)
        written: dict[str, Any] = head() if head else {}
        for name, key, default, omit, collects in _written(type(value)):
            item = getattr(value, name)
            if collects:
                written.update({str(k): encode(v) for k, v in item.items()})
            elif not (omit and item == default):
                written[key] = encode(item)
        return written
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


@functools.cache
def _written(kind: type) -> tuple[tuple[str, str, Any, bool, bool], ...]:
    """Return of each field: name, key, default, whether that is omitted, whether it collects."""
    found = []
    for item in fields(kind):
        default = item.default
        if default is MISSING and item.default_factory is not MISSING:
            default = item.default_factory()
        omit, collects = bool(item.metadata.get("omit")), bool(item.metadata.get("rest"))
        found.append((item.name, item.metadata.get("key", item.name), default, omit, collects))
    return tuple(found)


def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with their bounds."""
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _decoder(hint: Any, foreign: bool) -> _Decoder:
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *found = typing.get_args(hint)
        marks = tuple(found)
    origin = typing.get_origin(hint)
    if hint is Any:
        return _cleaned if foreign else _as_it_is
    if origin is Literal:
        return _one_of(typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return _either(typing.get_args(hint), foreign)
    if origin is tuple:
        return _list(_decoder(typing.get_args(hint)[0], foreign), _bound(marks, foreign))
    if origin is collections.abc.Mapping:
        key, item = (_decoder(argument, foreign) for argument in typing.get_args(hint))
        return _mapping(key, item, _bound(marks, foreign))
    if hint in (int, float):
        return _number(next((m for m in marks if isinstance(m, Between)), Between()), hint is int)
    if hint is str:
        return _text(next(iter(marks), None), foreign)
    if hint is bool:
        return _flag
    if is_dataclass(hint):
        kind = cast(type, hint)
        return _variant(kind, foreign) if "variant_of" in vars(kind) else _record(kind, foreign)
    raise TypeError(f"no way to read {hint!r} from JSON")


def _bound(marks: tuple[Any, ...], foreign: bool) -> float:
    most = next((mark.items for mark in marks if isinstance(mark, Most)), _MOST)
    return most if foreign else math.inf


def _record(kind: type, foreign: bool) -> _Decoder:
    hints = hints_of(kind)
    plan = []
    collects: str | None = None
    for item in fields(kind):
        if item.metadata.get("rest"):
            collects = item.name
            continue
        required = item.default is MISSING and item.default_factory is MISSING
        key = item.metadata.get("key", item.name)
        plan.append((item.name, key, _decoder(hints[item.name], foreign), required))
    known = frozenset(key for _, key, _, _ in plan)
    every = _decoder(hints[collects], foreign) if collects else _as_it_is
    # A newer host may say more.
    strict = bool(getattr(kind, "REFUSES_UNKNOWN", False)) and not foreign

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise Fault("an object", value)
        given = {}
        for name, key, decoder, required in plan:
            if key in value:
                try:
                    given[name] = decoder(value[key])
                except Fault as fault:
                    raise fault.below(key) from None
            elif required:
                raise Fault(f'the key "{key}"', value, missing=True)
        if strict and (unknown := sorted(map(str, value.keys() - known))):
            raise Fault(f"one of the keys {', '.join(sorted(known))}", unknown[0])
        if collects:
            given[collects] = every({k: v for k, v in value.items() if k not in known})
        return kind(**given)

    return read


def _variant(kind: Any, foreign: bool) -> _Decoder:
    return lambda value: _decoder(kind.variant_of(value), foreign)(value)


def _either(hints: tuple[Any, ...], foreign: bool) -> _Decoder:
    decoders = [_decoder(hint, foreign) for hint in hints if hint is not type(None)]
    nothing = type(None) in hints
    if len(decoders) == 1:
        (only,) = decoders
        return lambda value: None if value is None else only(value)

    def read(value: Any) -> Any:
        if value is None and nothing:
            return None
        for decoder in decoders[:-1]:
            try:
                return decoder(value)
            except Fault:
                continue
        return decoders[-1](value)

    return read


def _list(decoder: _Decoder, most: float) -> _Decoder:
    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise Fault("a list", value)
        if len(value) > most:
            raise Fault(f"at most {most} items", f"{len(value)} items")
        found = []
        for index, item in enumerate(value):
            try:
                found.append(decoder(item))
            except Fault as fault:
                raise fault.below(index) from None
        return tuple(found)

    return read


def _mapping(key_decoder: _Decoder, decoder: _Decoder, most: float) -> _Decoder:
    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise Fault("an object", value)
        if len(value) > most:
            raise Fault(f"at most {most} keys", f"{len(value)} keys")
        found = {}
        for key, item in value.items():
            try:
                name = key_decoder(key)
                found[name] = decoder(item)
            except Fault as fault:
                raise fault.below(str(key)) from None
        return found

    return read


def _number(bounds: Between, whole: bool) -> _Decoder:
    low, high, any_float = bounds.low, bounds.high, bounds.any_float
    kind = "a whole number" if whole else "a number"
    if low == 0 and high >= LARGEST:
        kind = "a count (a whole number from 0)" if whole else "a number from 0"
    elif (low, high) != (-LARGEST, LARGEST):
        kind = f"{kind} from {low:g} to {high:g}"

    def read(value: Any) -> Any:
        if type(value) is int and low <= value <= high:
            return value
        # A comparison with NaN is false.
        fits = isinstance(value, float) and not whole and low <= value <= high
        if fits or (any_float and isinstance(value, float) and not math.isfinite(value)):
            return value
        raise Fault(kind, value)

    return read


def _text(mark: Any, foreign: bool) -> _Decoder:
    if isinstance(mark, Like):
        fits, longest, expected = re.compile(mark.pattern).fullmatch, mark.longest, mark.expected

        def read_like(value: Any) -> Any:
            # Length first: a pattern must not work on what is too long anyway.
            if not isinstance(value, str) or len(value) > longest or not fits(value):
                raise Fault(expected, value)
            return value

        return read_like
    if isinstance(mark, Exact):
        exact = mark.longest

        def read_exact(value: Any) -> Any:
            if not isinstance(value, str) or (foreign and len(value) > exact):
                raise Fault(f"a text of at most {exact} characters", value)
            return value

        return read_exact
    if not foreign:
        return _plain_text
    most = mark.longest if isinstance(mark, Prose) else _LONGEST

    def read_prose(value: Any) -> Any:
        if not isinstance(value, str):
            raise Fault("a text", value)
        return printable(value[:most])

    return read_prose


def _plain_text(value: Any) -> Any:
    if not isinstance(value, str):
        raise Fault("a text", value)
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise Fault("true or false", value)
    return value


def _one_of(words: tuple[Any, ...]) -> _Decoder:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in words:
            raise Fault(f"one of {', '.join(words)}", value)
        return value

    return read


def _as_it_is(value: Any) -> Any:
    return value


def _cleaned(value: Any, deepest: int = _DEEPEST) -> Any:
    """Return any JSON of bounded depth with printable texts: for what is only shown or kept."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict | list) and not deepest:
        raise Fault(f"JSON of at most {_DEEPEST} levels", "a deeper one")
    if isinstance(value, dict):
        return {printable(key): _cleaned(item, deepest - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item, deepest - 1) for item in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return one_line(ascii(value[:80]), 40)
    names = {dict: "an object", list: "a list", type(None): "null"}
    if type(value) in names:
        return names[type(value)]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "a number out of range"
    return ascii(value)[:40] if isinstance(value, int | float) else type(value).__name__
