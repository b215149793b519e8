"""The parts of a plan; whole ones, with every key decided, stand in tests/golden/plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.plan.config import Config
from tunesmith.plan.plan import absolute_paths, disk_needs, train_phases

pytestmark = pytest.mark.unit


def config(overrides: dict[str, object] | None = None, **values: object) -> Config:
    base = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "output_dir": "saves/x"}
    return Config(Path("x.yaml"), base | values | (overrides or {}), overrides or {})


def test_paths_become_absolute_but_hub_names_stay() -> None:
    values: dict[str, object] = {
        "dataset_dir": "data",
        "deepspeed": "ds.json",
        "tokenized_path": None,
    }
    absolute_paths(values, lambda path: Path("/root") / path)
    assert values["dataset_dir"] == "/root/data"
    assert values["deepspeed"] == "/root/ds.json"
    online: dict[str, object] = {"dataset_dir": "REMOTE:some/repo"}
    absolute_paths(online, lambda path: Path("/root") / path)
    assert online["dataset_dir"] == "REMOTE:some/repo"


@pytest.mark.parametrize(
    ("values", "prompts", "evaluate", "measured"),
    [
        ({"val_size": 0.1}, [], True, True),
        ({"eval_dataset": "y"}, [], True, True),
        ({}, ["?"], True, True),
        ({}, [], True, False),
        ({"val_size": 0.1}, [], False, False),
        ({"val_size": 0.1, "stage": "dpo"}, ["?"], True, False),
        ({"val_size": 0.1, "do_train": False}, ["?"], True, False),
    ],
)
def test_measured_where_it_can_be(
    values: dict[str, object], prompts: list[str], evaluate: bool, measured: bool
) -> None:
    phases = train_phases(config(**values), prompts, evaluate=evaluate)
    assert phases == (("before", "train", "after") if measured else ("train",))


def test_disk_needs_of_a_lora_run() -> None:
    shapes = {
        "model.embed_tokens.weight": ("BF16", (1000, 64)),
        "model.layers.0.q_proj.weight": ("BF16", (64, 64)),
        "model.layers.0.up_proj.weight": ("BF16", (128, 64)),
        "model.layers.0.norm.weight": ("BF16", (64,)),
    }
    needs = disk_needs(config(lora_rank=4, save_total_limit=2), shapes, 1234, merge=True)
    trainable = 4 * (64 + 64) + 4 * (128 + 64)
    assert needs["3 checkpoints"] == 3 * (trainable * 12 + 16_000_000)
    assert needs["the adapter"] == trainable * 4
    assert needs["the merged model"] == 1234
    full = disk_needs(config(finetuning_type="full"), shapes, 1234, merge=False)
    assert full["the adapter"] == 4 * (1000 * 64 + 64 * 64 + 128 * 64 + 64)
    assert "the merged model" not in full
