"""A LLaMA-Factory YAML, read and checked before anything is started.

Every key and type comes from LLaMA-Factory's own dataclasses (configs/schema/), so that
a wrong one is refused in milliseconds instead of after the model was loaded. The image
plans with this module too, on Python 3.10 with the lock alone, which has no jsonschema; the
schema needs five of its words (docs/decisions/0007-the-image.md).
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core import documents
from tunesmith.core.documents import Arguments
from tunesmith.core.errors import UsageError
from tunesmith.plan.kind import Kind, refuse_kind
from tunesmith.plan.rules import check as rules
from tunesmith.plan.rules.fault import REMOVE, Fault, refusal
from tunesmith.plan.rules.packages import Remedy, no_remedy
from tunesmith.plan.yaml_file import read_mapping

# https://json-schema.org, as job/data/config_schema.py writes it.
JsonSchema = Mapping[str, Any]
# A number that YAML 1.1 (PyYAML) reads as text, because it wants a dot before the e.
_FLOAT_TEXT = re.compile(r"^[+-]?\d+(\.\d*)?[eE][+-]?\d+$")

# Keys that only the user can choose: what to look for.
_CHOSEN = {
    "template": "`inv model.list` shows the template of each known model",
    "dataset": "name a key of dataset_info.json",
    "model_name_or_path": "name a repo id or a folder",
}

# Whether a value has a JSON type; 2.0 is a whole number there, and true none.
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _number(value) and float(value).is_integer(),
    "number": lambda value: _number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Config:
    """A flat LLaMA-Factory config: its file, its keys with overrides applied, the overrides.

    `head` are the comment lines that the file begins with.
    """

    file: Path
    values: documents.Config
    overrides: documents.Config
    head: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The file's stem: train, merge and predict files of one model share it."""
        return self.file.stem

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value."""
        return self.values.get(key, default)


def load_config(
    file: Path,
    overrides: Sequence[str],
    schema_file: Path,
    installed: Collection[str] | None = None,
    wanted: Sequence[Kind] = (),
    remedy: Remedy = no_remedy,
) -> Config:
    """Read `file`, apply `key=value` overrides, and check every key.

    With `wanted`, a config for something else is refused. With `installed`, the packages of the
    training environment, the values are checked too, alone and together (plan/rules): as for a
    training or a prediction; `remedy` says how a package gets there. Raises UsageError with all
    faults of keys and types, or else of values: the first with its hint, the others as detail.
    """
    values, text = read_mapping(file)
    head = itertools.takewhile(lambda line: not line.strip() or line[0] == "#", text.splitlines())
    schema = json.loads(schema_file.read_text(encoding="utf-8"))
    parsed = parse_overrides(overrides) | _options_named(overrides, schema)
    values |= parsed
    if faults := find_faults(values, schema, frozenset(parsed)):
        raise refusal(file, faults, parsed)
    if wanted:
        refuse_kind(file, values, wanted)
    values = {key: _joined(value, schema["properties"][key]) for key, value in values.items()}
    if installed is not None and (faults := rules.find(values, schema, installed, remedy)):
        raise refusal(file, faults, parsed)
    return Config(file, values, parsed, tuple(head))


def parse_overrides(overrides: Sequence[str]) -> Arguments:
    """Read `key=value` words; a value is read as YAML, and 1e-4 as the number it means."""
    parsed: Arguments = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"{word!r} is not an override", hint="write key=value, as in num_train_epochs=1"
            )
        try:
            parsed[key] = float(text) if _FLOAT_TEXT.match(text) else yaml.safe_load(text)
        except yaml.YAMLError:
            parsed[key] = text
    return parsed


def _options_named(overrides: Sequence[str], schema: JsonSchema) -> Arguments:
    """Return the words that are an option of their key: eval_strategy=no is no YAML false."""
    known = schema["properties"]
    words = [(key, text) for key, _, text in (word.partition("=") for word in overrides)]
    return {key: text for key, text in words if key in known and text in _options(known[key])}


def find_faults(
    values: documents.Config, schema: JsonSchema, overridden: frozenset[str]
) -> list[Fault]:
    """Return a fault for each key that LLaMA-Factory would refuse or misread."""
    known = schema["properties"]
    faults = [_unknown(key, values, known, overridden) for key in values if key not in known]
    for key, value in values.items():
        if key in known and not fits(value, known[key]):
            faults.append(_misfit(key, value, known[key], overridden=key in overridden))
    missing = {
        "dataset": values.get("do_train") and "`dataset` is missing",
        "model_name_or_path": "`model_name_or_path` is missing",
    }
    for key, message in missing.items():
        if message and not values.get(key):
            faults.append(Fault(key, message, advice=_CHOSEN[key]))
    return faults


def _unknown(
    key: str, values: documents.Config, known: Mapping[str, JsonSchema], overridden: frozenset[str]
) -> Fault:
    message, change = f"unknown key `{key}`", {key: REMOVE}
    near = next(iter(difflib.get_close_matches(str(key), known, n=1)), None)
    if near is None:
        return Fault(key, message, change, "LLaMA-Factory has no such key")
    if near not in values or key in overridden:
        change[near] = values[key]
    return Fault(key, message, change, meant=near)


def _misfit(key: str, value: Any, rule: JsonSchema, *, overridden: bool) -> Fault:
    found = f"`{key}` (given on the command line)" if overridden else f"`{key}`"
    wanted = _wanted(rule)
    if isinstance(value, str) and _FLOAT_TEXT.match(value) and "number" in wanted:
        return Fault(key, f"{found} is {value}, which YAML reads as text", {key: float(value)})
    named = isinstance(value, bool) and any(isinstance(option, str) for option in _options(rule))
    read = f" (YAML reads {'yes or on' if value else 'no or off'} so)" if named else ""
    message = f"{found} is {value!r}{read}, but must be {wanted}"
    likely = _likely(value, rule)
    if likely is None and key in _CHOSEN:
        return Fault(key, message, advice=_CHOSEN[key])
    return Fault(key, message, {key: _usual(rule) if likely is None else likely})


def _likely(value: Any, rule: JsonSchema) -> object:
    """Return the value that was probably meant, or None."""
    options = [option for option in _options(rule) if isinstance(option, str)]
    if isinstance(value, bool):
        # Words that YAML 1.1 reads as one.
        words = ("yes", "on") if value else ("no", "off")
        return next((word for word in words if word in options), None)
    if not isinstance(value, str):
        return None
    with contextlib.suppress(yaml.YAMLError, RecursionError):
        # A number, or true and false, in quotes.
        if fits(plain := yaml.safe_load(value), rule):
            return plain
    return next(iter(difflib.get_close_matches(value, options, n=1)), None)


def _usual(rule: JsonSchema) -> object:
    """Return what is taken where a key is absent, to be written instead."""
    default = rule.get("default")
    return REMOVE if default is None or not fits(default, rule) else default


def fits(value: Any, rule: JsonSchema) -> bool:
    """Whether a JSON Schema (anyOf, enum, type, items: job/data/config_schema.py) takes a value."""
    if "anyOf" in rule:
        return any(fits(value, choice) for choice in rule["anyOf"])
    if "enum" in rule:
        # For JSON, true is no 1.
        return any(
            value == o and isinstance(value, bool) == isinstance(o, bool) for o in rule["enum"]
        )
    if "type" not in rule:
        return True
    if not _TYPES[rule["type"]](value):
        return False
    return "items" not in rule or all(fits(item, rule["items"]) for item in value)


def _options(rule: JsonSchema) -> list[Any]:
    if "enum" in rule:
        return list(rule["enum"])
    return [option for choice in rule.get("anyOf", ()) for option in _options(choice)]


def _wanted(rule: JsonSchema) -> str:
    """Return in words what a schema wants."""
    names = {
        "boolean": "true or false",
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "array": "a list",
        "object": "a mapping",
        "null": "null",
    }
    if "enum" in rule:
        shown = [str(option) for option in rule["enum"][:12]]
        return f"one of {', '.join(shown)}" + (", ..." if len(rule["enum"]) > 12 else "")
    if "anyOf" in rule:
        return " or ".join(
            _wanted(choice) for choice in rule["anyOf"] if choice != {"type": "null"}
        )
    return names.get(str(rule.get("type")), "another value")


def _joined(value: Any, rule: JsonSchema) -> Any:
    """Return a list of names as the text with commas that LLaMA-Factory splits into it."""
    listed = isinstance(value, list) and {"type": "string"} in rule.get("anyOf", ())
    return ",".join(map(str, value)) if listed else value
