"""The settings of tests/data/settings.yml, each laid over the demo's config.

Read by both sides: no import but yaml, the rules and the stack, Python 3.10.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.plan.rules.check import find
from tunesmith.plan.rules.fault import Fault, changed
from tunesmith.stack.definition import load_stack

ROOT = Path(__file__).resolve().parent.parent
ACCEPTS = "accepts"
BASE: Mapping[str, Any] = {
    **yaml.safe_load((ROOT / "configs/train/smollm2_135m_lora_sft.yaml").read_text("utf-8")),
    "use_cpu": True,
}
SCHEMA = json.loads((ROOT / "configs/schema/llamafactory-0.9.3.schema.json").read_text("utf-8"))
INSTALLED = load_stack(ROOT / "configs/stack.yml").flavour("cu128").packages


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    laid_over: Mapping[str, Any]
    parser: str
    ours: str
    outcome: str

    @property
    def values(self) -> dict[str, Any]:
        """The whole config."""
        return {**BASE, **self.laid_over}

    @property
    def faults(self) -> list[Fault]:
        """What our rules say to it."""
        return find(self.values, SCHEMA, INSTALLED)

    @property
    def mended(self) -> dict[str, Any] | None:
        """The config after every hint was followed literally, first things first.

        None where a hint cannot be: it wants something that only the user has.
        """
        values = self.values
        for _ in range(6):
            faults = find(values, SCHEMA, INSTALLED)
            if not faults:
                return values
            if not faults[0].change:
                return None
            values = changed(values, faults[0].change)
        raise AssertionError(f"{self}: hints lead round in a circle")

    def __str__(self) -> str:
        return json.dumps(self.laid_over)


SETTINGS = [
    Setting(row["set"], row["parser"], row["ours"], row.get("outcome", ""))
    for row in yaml.safe_load((ROOT / "tests/data/settings.yml").read_text("utf-8"))
]
