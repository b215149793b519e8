"""Say in plain words what is wrong at a place where JSON stops being JSON."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.bounded import DEEPEST, depth_at

_LOOKALIKES = {"“": '"', "”": '"', "‘": '"', "’": '"', "，": ",", "：": ":", "｛": "{", "｝": "}"}
_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's kind: string, number, boolean, null, list, object."""
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "number"), (float, "number"), (str, "string"))
    for python_type, name in (*names, (list, "list")):
        if isinstance(value, python_type):
            return name
    return "object"


def show(value: Any, width: int = 30) -> str:
    """Return a value as JSON on one line, cut to `width` characters, fit for any terminal."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= width else text[: width - 3] + "..."


def told(value: Any) -> str:
    """Return kind and value for a message: a number (3), an object ({}), null."""
    kind = kind_of(value)
    if kind == "null":
        return kind
    return f"{'an' if kind == 'object' else 'a'} {kind} ({show(value)})"


def quoted(value: Any) -> str:
    """Return how to turn `value` into the string that is needed."""
    return f'write it in quotes: "{value}"' if kind_of(value) == "number" else "write a string"


def excerpt(text: str, offset: int) -> str:
    """Return up to 20 characters of the line from `offset` on, quoted."""
    return repr(text[offset : offset + 20].split("\n")[0])


def explain(
    text: str, start: int, error: json.JSONDecodeError | RecursionError
) -> tuple[int, str, str]:
    """Return (offset, message, fix) for a value that begins at `start` and cannot be read."""
    if isinstance(error, RecursionError):
        depth = depth_at(text, start)
        told = f"lists or objects nested {depth} deep, at most {DEEPEST} are read"
        return start, told, "flatten the value"
    at, char = error.pos, text[error.pos : error.pos + 1]
    found = excerpt(text, at)
    if error.msg.startswith("Unterminated string"):
        return at, f"this string is not closed: {found}", 'add " at its end'
    if not text[at:].strip():
        return at, "the file ends inside this row", "is it cut off? copy it again, or close the row"
    if error.msg.startswith("Invalid control character"):
        told = "a line break" if char in "\r\n" else f"the control character {char!r}"
        return at, f"{told} inside a string", r"write \n (or \t) there, or close the string"
    if error.msg.startswith("Invalid \\"):
        return at, f"an escape JSON does not know: {found}", r"write \\ for a backslash"
    if char == "'":
        return at, f"a single quote: {found}", 'JSON takes double quotes "'
    if char in _LOOKALIKES:
        return at, f"the character {char} where JSON is written", f"write {_LOOKALIKES[char]}"
    if char == "#" or text.startswith(("//", "/*"), at):
        return at, f"a comment: {found}", "JSON has none: delete it"
    for word, right in _PYTHON_WORDS.items():
        if text.startswith(word, at):
            return at, f"{word} is Python, not JSON", f"write {right}"
    if error.msg.startswith("Expecting ',' delimiter"):
        fix = r"add a comma, or write \" for a quote inside a string"
        if char in "{[":
            fix = "add the comma, or the } that ends the row before"
        return at, f"a comma is missing before {found}", fix
    if error.msg.startswith("Expecting ':' delimiter"):
        return at, f"a colon is missing before {found}", "write : between key and value"
    if error.msg.startswith("Expecting property name"):
        return at, f"a key in double quotes is missing: {found}", 'write "key": value'
    return at, f"not JSON: {found}", "write a row: {...}"
