"""What `--preset fast` changes in a config, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.plan import presets
from tunesmith.plan.config import Config, load_config
from tunesmith.project import Project

pytestmark = pytest.mark.unit

# What a config cannot be without, below its head.
REST = "model_name_or_path: m\ndataset: d\ntemplate: smollm\n"


def config(overrides: dict[str, Any] | None = None, **values: Any) -> Config:
    written = {"stage": "sft", "do_train": True} | values | (overrides or {})
    return Config(Path("x.yaml"), written, overrides or {})


def test_the_effective_batch_stays_and_is_taken_at_once() -> None:
    written = config(per_device_train_batch_size=2, gradient_accumulation_steps=8)
    made, changed = presets.apply(written, "fast")
    assert made.get("per_device_train_batch_size") == 16
    assert made.get("gradient_accumulation_steps") == 1
    assert made.get("disable_gradient_checkpointing") is True
    assert {key: was for key, (was, _) in changed.items()} == {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "disable_gradient_checkpointing": None,
    }
    assert written.get("gradient_accumulation_steps") == 8


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_what_the_command_line_says_stays(key: str) -> None:
    written = config({key: 4}, gradient_accumulation_steps=4, disable_gradient_checkpointing=True)
    made, changed = presets.apply(written, "fast")
    assert made.values == written.values
    assert changed == {}


def test_without_a_preset_nothing_changes() -> None:
    written = config(gradient_accumulation_steps=8)
    assert presets.apply(written, "none") == (written, {})


def test_other_stages_are_refused() -> None:
    with pytest.raises(UsageError, match="stage: sft"):
        presets.apply(config(stage="dpo"), "fast")


@pytest.mark.parametrize(
    ("head", "asked", "found"),
    [
        ("# A model.\n# Preset:    fast\n\n", None, "fast"),
        ("# A model.\n# Preset:    fast\n\n", "none", "none"),
        ("# A model.\n\n", None, "none"),
        ("# A model.\n\n", "fast", "fast"),
        ("stage: sft\n# Preset: fast\n", None, "none"),
    ],
)
def test_the_head_of_a_config_names_a_preset(
    project: Project, tmp_path: Path, head: str, asked: str | None, found: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(head + "do_train: true\n" + REST)
    config = load_config(file, (), project.stack.schema)
    assert presets.preset_of(config, asked) == found


def test_an_unknown_preset_is_named() -> None:
    config = Config(Path("x.yaml"), {}, {}, ("# Preset: quick",))
    with pytest.raises(UsageError, match=r"x\.yaml: Preset: quick"):
        presets.preset_of(config, None)
    with pytest.raises(UsageError, match="--preset slow"):
        presets.preset_of(config, "slow")
