"""LLaMA-Factory's example YAMLs, composed of tests/data/example_configs.yml, for both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_TABLE = yaml.safe_load(
    (Path(__file__).parent / "data" / "example_configs.yml").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Example:
    """One of them: its path below examples/, its values, and what comes of it here."""

    file: str
    kind: str
    verdict: str
    says: str
    hint: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return self.file


def _example(row: Mapping[str, Any]) -> Example:
    common = _TABLE["common"] if row["kind"] == "train" else {}
    left_out = row.get("without", ())
    values = {key: value for key, value in common.items() if key not in left_out} | row["set"]
    return Example(
        row["file"], row["kind"], row["verdict"], row.get("says", ""), row.get("hint", ""), values
    )


EXAMPLES = [_example(row) for row in _TABLE["examples"]]
