"""The rows of tests/data/broken_configs.yml as files, and the change that each asks for, followed.

Read by both sides: no import but yaml and what plans, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.plan.rules.fault import written

ROOT = Path(__file__).resolve().parent.parent
DEMO = (ROOT / "configs/train/smollm2_135m_lora_sft.yaml").read_text("utf-8")


@dataclass(frozen=True)
class Broken:
    """A config that is refused: `text`, by which `layer`, in what words, and what mends it."""

    name: str
    text: str
    layer: str
    says: str
    write: Mapping[str, Any]
    remove: Sequence[str]
    remove_last: str
    names: Sequence[str]

    @property
    def named(self) -> Sequence[str]:
        """What error and hint must hold, so that a person knows what to do."""
        if self.names:
            return self.names
        steps = [f"write `{key}: {written(value)}`" for key, value in self.write.items()]
        removed = [*self.remove, *([self.remove_last] if self.remove_last else [])]
        return (
            [*steps, *(f"`{key}`" for key in removed)]
            if self.layer == "static"
            else [
                *(f"`{key}: {written(value)}`" for key, value in self.write.items()),
                *(f"remove `{key}`" for key in removed),
            ]
        )

    @property
    def mended(self) -> str:
        """The text after the change."""
        text = self.text
        if self.remove_last:
            head, _, tail = text.rpartition(f"{self.remove_last}:")
            text = head + tail.partition("\n")[2]
        text = _without(text, {*self.remove, *self.write})
        return text + "".join(f"{key}: {written(value)}\n" for key, value in self.write.items())

    def __str__(self) -> str:
        return self.name


def _without(text: str, keys: set[str]) -> str:
    """Return a config's lines but those of some keys, whatever colon follows them."""
    kept = [line for line in text.splitlines() if _key(line) not in keys]
    return "\n".join(kept) + "\n"


def _key(line: str) -> str:
    return line.replace("：", ":").partition(":")[0]


def _row(row: Mapping[str, Any]) -> Broken:
    typed, added = str(row.get("type", "")), str(row.get("added", ""))
    text = _without(DEMO, {_key(line) for line in typed.splitlines()}) if typed else DEMO
    lines = "".join(f"{lines}\n" for lines in (typed, added) if lines)
    return Broken(
        name=" + ".join([*typed.splitlines(), *added.splitlines()]),
        text=text + lines,
        layer=row["layer"],
        says=row["says"],
        write=row.get("write", {}),
        remove=row.get("remove", ()),
        remove_last=row.get("remove_last", ""),
        names=row.get("names", ()),
    )


BROKEN = [
    _row(row) for row in yaml.safe_load((ROOT / "tests/data/broken_configs.yml").read_text("utf-8"))
]
