"""A config with LLaMA-Factory's defaults behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a config says, and what LLaMA-Factory takes for a key it does not say."""

    values: Mapping[str, object]
    defaults: Mapping[str, object]

    def get(self, key: str) -> object:
        """Return what holds for a key. Raises KeyError for one that neither side knows."""
        if key in self.values:
            return self.values[key]
        return self.defaults[key]

    def on(self, key: str) -> bool:
        """Whether a key holds anything but false, null, 0 or nothing."""
        return bool(self.get(key))

    def number(self, key: str) -> float:
        """Return a key's number, 0 for null. Raises TypeError for anything else."""
        value = self.get(key)
        if value is None:
            return 0.0
        if isinstance(value, (int, float)):
            return float(value)
        raise TypeError(f"{key} is {value!r}")

    def names(self, key: str) -> list[str]:
        """Return the parts of a key that holds names with commas between them."""
        value = self.get(key)
        if value is None:
            return []
        if isinstance(value, list):
            return [str(item) for item in value]
        return [part.strip() for part in str(value).split(",")]

    @property
    def stage(self) -> str:
        """The stage: pt, sft, rm, ppo, dpo or kto."""
        return str(self.get("stage"))

    @property
    def method(self) -> str:
        """The method: lora, freeze or full."""
        return str(self.get("finetuning_type"))

    @property
    def has_validation(self) -> bool:
        """Whether rows are held out."""
        return bool(self.get("eval_dataset")) or self.number("val_size") > 1e-6

    @property
    def evaluates(self) -> bool:
        """Whether the trainer evaluates: `eval_strategy` alone turns `do_eval` on."""
        return self.on("do_eval") or self.get("eval_strategy") in ("steps", "epoch")
