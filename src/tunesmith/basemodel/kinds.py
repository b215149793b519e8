"""What a folder of weights is for: a model, an adapter, or a reward model with its value head.

PEFT 0.15.2 reads adapter_config.json and adapter_model.safetensors; LLaMA-Factory 0.9.3 reads
value_head.safetensors beside the weights of a `stage: rm` run (model_utils/valuehead.py). Standard
library, Python 3.10.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.files import Problem
from tunesmith.core.errors import UsageError

Kind = Literal["model", "adapter", "reward_model", "reward_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
VALUE_HEAD = "value_head.safetensors"
# Keys of an adapter's config that name modules: PEFT imports them.
CODE_KEYS = ("auto_mapping", "megatron_config")
ADAPTERS: tuple[Kind, ...] = ("adapter", "reward_adapter")
NOUNS: Mapping[Kind, str] = {
    "model": "a base model",
    "adapter": "an adapter",
    "reward_model": "a reward model",
    "reward_adapter": "the adapter of a reward model",
}
REWARDS: tuple[Kind, ...] = ("reward_model", "reward_adapter")


class Hashed(Protocol):
    """A record of a file that has its sha256."""

    @property
    def sha256(self) -> str:
        """64 hex digits."""
        ...


def choose(kind: Kind, names: Iterable[str], allow_pickle: bool = False) -> tuple[str, ...]:
    """Return those of `names` that one of this kind needs; see `files.choose`."""
    names = tuple(names)
    taken = model_files.choose(names, allow_pickle)
    if kind in REWARDS and VALUE_HEAD in names and VALUE_HEAD not in taken:
        return tuple(sorted((*taken, VALUE_HEAD)))
    return taken


def has_kind(kind: Kind, names: Iterable[str]) -> bool:
    """Whether files of these names may be one of this kind."""
    names = set(names)
    own = ADAPTER_CONFIG if kind in ADAPTERS else model_files.CONFIG
    return own in names and (kind not in REWARDS or VALUE_HEAD in names)


def verify(kind: Kind, folder: Path, allow_pickle: bool = False) -> tuple[Problem, ...]:
    """Return every fault of a folder as one of this kind, as `files.verify` does for a model."""
    problems = [
        *(
            _adapter(folder)
            if kind in ADAPTERS
            else model_files.verify(folder, None, False, allow_pickle)
        )
    ]
    if folder.is_dir() and kind in REWARDS and not (folder / VALUE_HEAD).is_file():
        problems.append(Problem(VALUE_HEAD, "missing: not the result of a `stage: rm` run"))
    return tuple(problems)


def _adapter(folder: Path) -> tuple[Problem, ...]:
    if not folder.is_dir():
        return (Problem(str(folder), "is not a folder"),)
    config, fault = model_files.json_object(folder / ADAPTER_CONFIG)
    if fault:
        return (Problem(ADAPTER_CONFIG, fault),)
    if config.get("peft_type") != "LORA":
        return (Problem(ADAPTER_CONFIG, f"peft_type is {config.get('peft_type')!r}, not 'LORA'"),)
    for key in CODE_KEYS:
        if config.get(key):
            return (Problem(ADAPTER_CONFIG, f"{key} is set, which names code: it is not run"),)
    names = [path.name for path in folder.iterdir()]
    if ADAPTER_WEIGHTS not in names:
        pickled = [name for name in model_files.pickles(names) if name.startswith("adapter_model")]
        why = f"; {pickled[0]} can run code when loaded: save it as safetensors" if pickled else ""
        return (Problem(ADAPTER_WEIGHTS, f"missing{why}"),)
    try:
        model_files.tensor_shapes(folder)
    except UsageError as error:
        return (Problem(ADAPTER_WEIGHTS, str(error.message)),)
    return ()


def digest(files: Mapping[str, Hashed]) -> str:
    """Return one sha256 of a folder: over the names and sha256 of its files."""
    listed = json.dumps(sorted((name, record.sha256) for name, record in files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()
