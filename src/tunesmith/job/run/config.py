"""The train config of a run: read, and the adapters that it names. Standard library and yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.job.run.folder import RunFolder

# Keys that LLaMA-Factory splits at commas into adapters, first to last (hparams/model_args.py).
SEVERAL = ("adapter_name_or_path", "ref_model_adapters", "reward_model_adapters")


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the train config of a run; UsageError when there is none."""
    try:
        return RunFolder(run_dir).config()
    except FileNotFoundError:
        raise UsageError(
            f"{run_dir}: not a run folder (no config.yaml)", hint="`inv runs` lists the runs"
        ) from None


def names_in(value: object) -> list[str]:
    """Return the names in a value that LLaMA-Factory splits at commas."""
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(name).strip() for name in names]


def put_name(values: dict[str, Any], key: str, place: int, name: str) -> None:
    """Let a key name something else at a place, from 0; `values` are changed in place."""
    names = names_in(values[key]) if key in SEVERAL else [""]
    names[place] = name
    values[key] = ",".join(names)


def starting_adapters(config: Mapping[str, Any]) -> list[str]:
    """Return the adapters the train config starts from, first to last."""
    return names_in(config.get("adapter_name_or_path"))


def kind_of_reward(config: Mapping[str, Any]) -> str:
    """Return what `reward_model` is: lora (LLaMA-Factory's default), full or api."""
    return str(config.get("reward_model_type") or "lora")


def other_adapters(config: Mapping[str, Any]) -> list[str]:
    """Return the adapters that the train config reads besides those it starts from."""
    found = names_in(config.get("ref_model_adapters"))
    found += names_in(config.get("reward_model_adapters"))
    if config.get("reward_model") and kind_of_reward(config) == "lora":
        found.append(str(config["reward_model"]))
    return found


def other_models(config: Mapping[str, Any]) -> list[str]:
    """Return the models that the train config reads besides its base model."""
    keys = ("ref_model", "reward_model") if kind_of_reward(config) == "full" else ("ref_model",)
    return [str(config[key]) for key in keys if config.get(key)]


def tuned_adapters(config: Mapping[str, Any], output: Path) -> list[str]:
    """Return the adapters that make the trained model, first to last.

    LLaMA-Factory continues the last adapter it was given, so `output` takes its place,
    unless create_new_adapter put a new one on top of all of them.
    """
    started = starting_adapters(config)
    below = started if config.get("create_new_adapter") else started[:-1]
    return [*below, str(output)]
