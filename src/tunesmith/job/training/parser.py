"""LLaMA-Factory's own parsers, and what they say to a config that they refuse, in one line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.job.run import messages
from tunesmith.job.run.failures import JobError, of_the_machine

MODULE = "llamafactory.hparams"
# By what a config is for: hparams/parser.py.
PARSERS = {"train": "get_train_args", "infer": "get_infer_args", "eval": "get_eval_args"}
# What no config can do without: never named as the key to remove.
_NEEDED = frozenset(
    {"model_name_or_path", "output_dir", "stage", "do_train", "dataset", "template"}
)


@dataclass(frozen=True)
class Refusal:
    """Why a config is refused: one line with the keys it is about, and what ends it."""

    message: str
    hint: str

    def error(self) -> JobError:
        """Return it as the failure of a phase."""
        return JobError("config", self.message, hint=self.hint)


def refuse(config: Mapping[str, Any], kind: str = "train") -> None:
    """Raise JobError of class `config` when LLaMA-Factory's parser refuses a config.

    What it says of the machine (a driver, memory) passes through as it is.
    """
    if found := refusal(config, kind):
        raise found.error()


def refusal(config: Mapping[str, Any], kind: str = "train") -> Refusal | None:
    """Return why LLaMA-Factory's parser refuses a config; None when it takes it."""
    error = _asked(config, kind)
    if error is None:
        return _ignored(config)
    text = f"{type(error).__name__}: {error}"
    if of_the_machine(text) or isinstance(error, MemoryError):
        raise error
    known = messages.find(text)
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
    if known is not None and known.remedy:
        return Refusal(f"{_named(known.keys)}: LLaMA-Factory says: {said}", known.remedy)
    blamed = _blamed(config, kind)
    keys = known.keys if known is not None and known.keys else blamed
    about = _named([key for key in keys if key in config] or keys) or "config"
    hint = f"remove `{blamed[0]}`" if blamed else "change what it names"
    return Refusal(f"{about}: LLaMA-Factory says: {said}", hint)


def _asked(config: Mapping[str, Any], kind: str) -> Exception | None:
    """Return what the parser raises."""
    parse = getattr(importlib.import_module(MODULE), PARSERS[kind])
    try:
        parse(dict(config))
    except Exception as error:  # noqa: BLE001 - whatever it raises is its answer
        return error
    return None


def _ignored(config: Mapping[str, Any]) -> Refusal | None:
    """Return what LLaMA-Factory would pass over with a warning: another kernel than was asked."""
    if config.get("flash_attn") != "fa2":
        return None
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return None
    message = "`flash_attn`: fa2 cannot be used here: it takes the flash-attn package and a GPU"
    return Refusal(message, "write `flash_attn: auto`")


def _blamed(config: Mapping[str, Any], kind: str) -> list[str]:
    """Return the keys without any one of which the config is taken."""
    tried = [key for key in config if key not in _NEEDED]
    return [
        key
        for key in tried
        if _asked({name: value for name, value in config.items() if name != key}, kind) is None
    ]


def _named(keys: Sequence[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
