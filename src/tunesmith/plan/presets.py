"""`--preset fast`: which keys of a config it changes, and why. Pure; nothing is changed silently.

A preset changes how fast a training is computed, not what is learnt: the effective batch, the
learning rate and the number of steps stay. What depends on the machine (how many rows fit, CUDA
graphs) is tried by the job runner, job/training/fast_trainer.py, when it gets there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.plan.config import Config

PRESETS = ("fast", "none")
# A line of a config's head: LLaMA-Factory knows no such key, so it cannot be one.
_HEAD = re.compile(r"^#\s*Preset:\s+(\S+)")


def preset_of(config: Config, requested: str | None) -> str:
    """Return the preset that is requested, or that the config's head names, or "none".

    Raises UsageError for one that does not exist.
    """
    where, name = "--preset", requested
    if not name:
        where, name = f"{config.file}: Preset:", "none"
        for line in config.head:
            if found := _HEAD.match(line):
                name = found[1]
    if name not in PRESETS:
        raise UsageError(f"{where} {name}: no such preset; there are {', '.join(PRESETS)}")
    return name


def apply(config: Config, name: str) -> tuple[Config, Mapping[str, tuple[Any, str]]]:
    """Return the config as the preset makes it, and by key what was written and why it changed.

    A key given on the command line stays as given. Raises UsageError for a config that the
    preset does not cover.
    """
    if name != "fast":
        return config, {}
    if config.get("stage", "sft") != "sft" or not config.get("do_train"):
        raise UsageError(f"{config.file}: --preset fast is for a training with stage: sft")
    wanted: dict[str, tuple[Any, str]] = {}
    rows = int(config.get("per_device_train_batch_size", 8))
    accumulation = int(config.get("gradient_accumulation_steps", 1))
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if accumulation > 1 and not set(batch) & set(config.overrides):
        why = "the rows of a step at once, as many as fit; the effective batch stays"
        wanted["per_device_train_batch_size"] = (rows * accumulation, why)
        wanted["gradient_accumulation_steps"] = (1, why)
    key = "disable_gradient_checkpointing"
    if not config.get(key) and key not in config.overrides:
        wanted[key] = (True, "no activation is computed twice; on again if memory is short")
    changed = {key: (config.get(key), why) for key, (_, why) in wanted.items()}
    values = {**config.values, **{key: value for key, (value, _) in wanted.items()}}
    return replace(config, values=values), changed
