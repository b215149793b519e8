"""docs/run-schema.json: the contract of the two halves as a JSON schema, for other programs.

It is made from the types of job/run (schema, events, replies): a definition for each, with the
first line of its docstring.
"""

from __future__ import annotations

import collections.abc
import json
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from tunesmith.job.run import events, replies, schema
from tunesmith.job.run.codec import Between, Like, hints_of

FILE = Path("docs") / "run-schema.json"
# The files of a run folder, and the agent's answers.
_FILES: dict[str, type] = {
    "run.json": schema.RunRequest,
    "status.json": schema.RunStatus,
    "events.jsonl": events.Event,
    "heartbeat.json": schema.Heartbeat,
    "adjustments.json": schema.Adjustments,
    "pulled.json": schema.CopyRecord,
}
_ANSWERS = (
    *(replies.RunNamed, replies.RunShown, replies.RunList, replies.RunSnapshot, replies.Manifest),
    *(replies.Removed, replies.CommandResult, replies.Resumed, replies.Refusal),
)
_Schema = dict[str, Any]


def render(root: Path) -> dict[Path, str]:
    """Return path -> text of the schema."""
    definitions: dict[str, _Schema] = {}
    described = {name: _of(kind, definitions) for name, kind in _FILES.items()}
    for answer in _ANSWERS:
        _of(answer, definitions)
    value = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"The files of a tunesmith run, contract version {schema.CONTRACT}",
        "description": "Rendered by `inv stack.render` from src/tunesmith/job/run/schema.py.",
        "properties": described,
        "$defs": dict(sorted(definitions.items())),
    }
    return {root / FILE: json.dumps(value, ensure_ascii=False, indent=2) + "\n"}


def _of(hint: Any, definitions: dict[str, _Schema]) -> _Schema:
    """Return the schema of a field's type; those of dataclasses go into `definitions`."""
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *found = typing.get_args(hint)
        marks = tuple(found)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is events.Event:
        kinds = (*events.KINDS.values(), events.OtherEvent)
        return {"anyOf": [_of(kind, definitions) for kind in kinds]}
    if is_dataclass(hint):
        return _reference(typing.cast(type, hint), definitions)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(argument, definitions) for argument in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is collections.abc.Mapping:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    if hint is Any:
        return {}
    names = {int: "integer", float: "number", str: "string", bool: "boolean"}
    found_schema: _Schema = {"type": names.get(hint, "null")}
    for mark in marks:
        if isinstance(mark, Between) and not mark.any_float:
            found_schema |= {"minimum": mark.low, "maximum": mark.high}
        elif isinstance(mark, Like):
            found_schema |= {"pattern": f"^(?:{mark.pattern})$", "maxLength": mark.longest}
    return found_schema


def _reference(kind: type, definitions: dict[str, _Schema]) -> _Schema:
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # a place for what refers to itself
        definitions[name] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _object(kind: type, definitions: dict[str, _Schema]) -> _Schema:
    hints = hints_of(kind)
    properties: dict[str, _Schema] = {}
    required = []
    if event := getattr(kind, "NAME", ""):
        properties["event"] = {"const": event}
        required.append("event")
    for item in fields(kind):
        if item.metadata.get("rest"):
            continue
        key = item.metadata.get("key", item.name)
        properties[key] = _of(hints[item.name], definitions)
        if item.default is MISSING and item.default_factory is MISSING:
            required.append(key)
    about = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return {
        "description": about,
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
    }
