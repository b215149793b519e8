"""What the stack's transformers and LLaMA-Factory know of models, and what newer ones do.

known.json is rendered from the packages (job/data/model_facts.py, `inv stack.render`), so that a
model is judged in milliseconds, without torch. Standard library, Python 3.10.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KNOWN = Path(__file__).with_name("known.json")
NEWER = Path(__file__).with_name("newer_types.txt")


@dataclass(frozen=True)
class Template:
    """A template of LLaMA-Factory: `tokens`, which a tokenizer must have for it, and `marks`, what
    it writes around a question."""

    tokens: tuple[str, ...]
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """known.json.

    `types` has by model_type whether the head is tied to the embedding where config.json does not
    say, None for one that LLaMA-Factory cannot load; `models` the template by the hub's name.
    """

    transformers: str
    llamafactory: str
    types: Mapping[str, bool | None]
    templates: Mapping[str, Template]
    models: Mapping[str, str]


@functools.cache
def known() -> Known:
    """Return known.json."""
    raw = json.loads(KNOWN.read_text(encoding="utf-8"))
    return Known(
        transformers=raw["transformers"],
        llamafactory=raw["llamafactory"],
        types=raw["types"],
        templates={
            name: Template(tuple(one["tokens"]), tuple(one["marks"]))
            for name, one in raw["templates"].items()
        },
        models=raw["models"],
    )


@functools.cache
def newer_types() -> Mapping[str, str]:
    """Return by model_type the first release of transformers that has it, of those that are newer
    than the stack's."""
    lines = NEWER.read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return {kind: release for release, kind in pairs}
