"""LLaMA-Factory's config keys as a JSON Schema: `python -m tunesmith.job.data.config_schema`.

Made from the very dataclasses LLaMA-Factory parses a YAML with, so that the control
half can refuse a wrong key in milliseconds, without torch, before anything is started.
Editors complete keys from the same file (yaml-language-server reads JSON Schema).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
import types
import typing
from typing import Any, Union

JsonSchema = dict[str, Any]  # https://json-schema.org/draft/2020-12/schema

_SPLIT = (
    "dataset",
    "eval_dataset",
    "interleave_probs",
    "lora_target",
    "additional_target",
    "freeze_trainable_modules",
    "freeze_extra_modules",
    "galore_target",
    "apollo_target",
)
_SIMPLE = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}


def schema_of(kind: Any) -> JsonSchema:
    """Return the JSON Schema of a type annotation; {} (anything) for what has none."""
    if kind is type(None):
        return {"type": "null"}
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        choices = [schema_of(argument) for argument in arguments]
        if any("enum" in choice for choice in choices):
            # `Union[SomeEnum, str]` means "a member's value": any other text fails later.
            choices = [choice for choice in choices if choice != {"type": "string"}]
        return {} if {} in choices else {"anyOf": choices}
    if origin is list or kind is list:
        items = {"items": schema_of(arguments[0])} if arguments else {}
        return {"type": "array", **items}
    if origin is dict:
        return {"type": "object"}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    return {}


def _default_of(field: dataclasses.Field[Any]) -> JsonSchema:
    """Return the JSON Schema's `default` of a field; {} where it has none that JSON can say."""
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return {}
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return {}
    return {"default": value}


def main() -> int:
    """Print the schema of every key a LLaMA-Factory YAML may have."""
    import llamafactory
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import (
        DataArguments,
        EvaluationArguments,
        FinetuningArguments,
        GeneratingArguments,
        ModelArguments,
        RayArguments,
        TrainingArguments,
    )

    properties: dict[str, JsonSchema] = {}
    for group in (
        ModelArguments,
        DataArguments,
        TrainingArguments,
        FinetuningArguments,
        GeneratingArguments,
        EvaluationArguments,
        RayArguments,
    ):
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if not field.init:
                continue
            properties[field.name] = schema_of(hints[field.name]) | _default_of(field)
    properties["template"]["anyOf"] = [{"enum": sorted(TEMPLATES)}, {"type": "null"}]
    # Their parser splits these at commas and takes a list as it is (hparams, `split_arg`).
    for key in _SPLIT:
        listed = {"type": "array", "items": {"type": "number" if "probs" in key else "string"}}
        choices = properties[key].pop("anyOf", [{"type": properties[key].pop("type", "string")}])
        properties[key] = {"anyOf": [*choices, listed], **properties[key]}
    # `true` means the newest checkpoint (transformers, Trainer.train).
    properties["resume_from_checkpoint"]["anyOf"].append({"type": "boolean"})
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"LLaMA-Factory {llamafactory.__version__} config",
        "type": "object",
        "additionalProperties": False,
        "properties": dict(sorted(properties.items())),
    }
    json.dump(schema, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
