"""A renderer for the part of Go's text/template used in the chat templates of Ollama Modelfiles.

Ollama renders TEMPLATE with Go's text/template (pkg.go.dev/text/template), with .System,
.Messages and, inside `range .Messages`, .Role and .Content. Supported: text, trim markers, fields,
variables, strings, `if` / `else if` / `else` / `range` / `end`, and eq, ne, and, or, not.
Anything else is refused by name, because a guess would prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import TunesmithError

_PIECE = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_ASSIGN = re.compile(r"^(\$\w+)\s*:?=\s*(.*)$", re.DOTALL)
_TOKEN = re.compile(r'\(|\)|"(?:[^"\\]|\\.)*"|`[^`]*`|[^\s()]+')
Piece = tuple[str, str]  # ("text", ...) or ("action", ...)


def render(template: str, system: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt that Ollama would render; `messages` contain role and content.

    As in Ollama, a system text is in .System and also among .Messages. Raises TunesmithError for
    unsupported or invalid templates.
    """
    listed = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    if system:
        listed.insert(0, {"Role": "system", "Content": system})
    top = _Dot({"System": system, "Messages": listed}, {})
    pieces = list(_pieces(template))
    out: list[str] = []
    end = _block(pieces, 0, top, out, on=True)
    if end != len(pieces):
        raise TunesmithError(f"Modelfile TEMPLATE: {{{{ {pieces[end][1]} }}}} closes nothing")
    return "".join(out)


Value = Any  # a text, a list or a map: what a template prints and ranges over


@dataclass(frozen=True)
class _Dot:
    """The value of `.`, and the variables set so far, which blocks share."""

    fields: Mapping[str, Value]
    variables: dict[str, Value]


def _pieces(template: str) -> Iterator[Piece]:
    position, trim = 0, False
    for match in _PIECE.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trim else text
        yield "text", text.rstrip() if match[1] else text
        yield "action", match[2]
        position, trim = match.end(), bool(match[3])
    yield "text", template[position:].lstrip() if trim else template[position:]


def _block(pieces: Sequence[Piece], at: int, dot: _Dot, out: list[str], *, on: bool) -> int:
    """Render from piece `at` to the else or end that closes the block; return its index."""
    while at < len(pieces):
        kind, text = pieces[at]
        word = text.split()[0] if kind == "action" and text else ""
        if word in ("else", "end"):
            return at
        if kind == "text":
            out += [text] if on else []
        elif word == "if":
            at = _if(pieces, at, dot, out, on=on)
        elif word == "range":
            at = _range(pieces, at, dot, out, on=on)
        elif on and (assigned := _ASSIGN.match(text)):
            dot.variables[assigned[1]] = _value(assigned[2], dot)
        elif not text.startswith("/*") and on:
            out.append(str(_value(text, dot)))
        at += 1
    return at


def _if(pieces: Sequence[Piece], at: int, dot: _Dot, out: list[str], *, on: bool) -> int:
    """Render an if with its branches; return the index of its end."""
    opened, condition, done = pieces[at][1], pieces[at][1][2:], False
    while True:
        chosen = on and not done and bool(_value(condition, dot))
        at = _block(pieces, at + 1, dot, out, on=chosen)
        done = done or chosen
        if at >= len(pieces):
            raise TunesmithError(f"Modelfile TEMPLATE: {{{{ {opened} }}}} has no end")
        parts = pieces[at][1].split(None, 2)
        if parts[0] == "end":
            return at
        condition = parts[2] if parts[1:2] == ["if"] else '"else"'


def _range(pieces: Sequence[Piece], at: int, dot: _Dot, out: list[str], *, on: bool) -> int:
    """Render a range over a list; return the index of its end."""
    opened = pieces[at][1]
    items = _value(opened[len("range") :], dot) if on else []
    end = _block(pieces, at + 1, dot, [], on=False)
    if end >= len(pieces) or pieces[end][1] != "end":
        raise TunesmithError(f"Modelfile TEMPLATE: {{{{ {opened} }}}}: expected a plain end")
    for item in items:
        _block(pieces, at + 1, _Dot(item, dot.variables), out, on=True)
    return end


def _value(expression: str, dot: _Dot) -> Value:
    tokens = _TOKEN.findall(expression)
    value, rest = _call(tokens, dot, expression)
    if rest:
        raise _unsupported(expression)
    return value


def _call(tokens: list[str], dot: _Dot, expression: str) -> tuple[Value, list[str]]:
    """Return the value of a function call, or of one operand, and the remaining tokens."""
    if not tokens:
        raise _unsupported(expression)
    name, rest = tokens[0], tokens[1:]
    if name not in ("eq", "ne", "and", "or", "not"):
        return _operand(tokens, dot, expression)
    operands = []
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, expression)
        operands.append(value)
    if not operands or (name in ("eq", "ne") and len(operands) < 2):
        raise _unsupported(expression)
    if name == "not":
        return not operands[0], rest
    if name in ("eq", "ne"):
        same = operands[0] in operands[1:]
        return same if name == "eq" else not same, rest
    # and/or return an operand, as in Go.
    settled = next((v for v in operands if bool(v) == (name == "or")), operands[-1])
    return settled, rest


def _operand(tokens: list[str], dot: _Dot, expression: str) -> tuple[Value, list[str]]:
    word, rest = tokens[0], tokens[1:]
    if word == "(":
        value, rest = _call(rest, dot, expression)
        if rest[:1] != [")"]:
            raise _unsupported(expression)
        return value, rest[1:]
    if word[0] == '"':
        return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), word[1:-1]), rest
    if word[0] == "`":
        return word[1:-1], rest
    if word[0] == "." and word[1:] in dot.fields:
        return dot.fields[word[1:]], rest
    if word in dot.variables:
        return dot.variables[word], rest
    raise _unsupported(expression)


def _unsupported(expression: str) -> TunesmithError:
    return TunesmithError(
        f"Modelfile TEMPLATE: {{{{ {expression.strip()} }}}} is not supported here"
    )
