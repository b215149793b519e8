"""Rows and steps told before a training are those that LLaMA-Factory and the trainer come to.

Its own loader makes the rows, and transformers' Trainer counts the steps; ours are the arithmetic
of the plan (dataset/mix.py, which reads no row) and the replay.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from llamafactory.data.loader import _get_merged_dataset, get_dataset
from llamafactory.data.template import TEMPLATES
from torch.utils.data import DataLoader

from tunesmith.core.errors import UsageError
from tunesmith.dataset import mix
from tunesmith.dataset.cost import steps_of
from tunesmith.dataset.media import TAKEN
from tunesmith.job.data.replay import replay
from tunesmith.job.data.rows import DataPipeline

SETS = {"few": 3, "some": 40, "many": 119, "again": 7, "texts": 25}
SAMPLED = 12  # of the seven rows of `again`
MIXED = {"dataset": "few,some,many"}
UNDER = {**MIXED, "mix_strategy": "interleave_under"}
OVER = {**MIXED, "mix_strategy": "interleave_over"}

COMBINATIONS: tuple[dict[str, Any], ...] = (
    {"dataset": "many"},
    {"dataset": "many", "num_train_epochs": 1.5, "gradient_accumulation_steps": 8},
    {"dataset": "many", "val_size": 0.1},
    {"dataset": "many", "val_size": 0.01, "max_samples": 50},
    {"dataset": "many", "val_size": 17, "per_device_train_batch_size": 3},
    {"dataset": "few", "gradient_accumulation_steps": 16},
    {"dataset": "many", "max_steps": 11},
    {"dataset": "many", "dataloader_drop_last": True, "per_device_train_batch_size": 8},
    {"dataset": "again", "per_device_train_batch_size": 1},
    {"dataset": "again,many", "max_samples": 10},
    MIXED,
    {**MIXED, "max_samples": 20, "val_size": 0.2},
    UNDER,
    {**UNDER, "val_size": 0.25},
    OVER,
    {**OVER, "max_samples": 30, "num_train_epochs": 2.0},
    {**UNDER, "interleave_probs": "0.1,0.3,0.6"},
    {**UNDER, "interleave_probs": "0,0.5,0.5", "seed": 7},
    {**OVER, "interleave_probs": "0.2,0.3,0.5"},
    {**OVER, "interleave_probs": "0.02,0.49,0.49", "seed": 3, "val_size": 0.1},
    {"dataset": "many", "packing": True},
    {**OVER, "packing": True, "val_size": 0.1},
    {"dataset": "texts", "stage": "pt"},
    {"dataset": "texts", "stage": "pt", "packing": False, "val_size": 0.1},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("counts")
    registry: dict[str, Any] = {}
    for name, number in SETS.items():
        texts = name == "texts"
        rows = [
            {"text": f"{name} {n} " * (n % 9 + 1)}
            if texts
            else {"instruction": f"{name} {n}", "output": "an answer " * (n % 5 + 1)}
            for n in range(number)
        ]
        (made / f"{name}.json").write_text(json.dumps(rows))
        columns = {"prompt": "text"} if texts else {"prompt": "instruction", "response": "output"}
        registry[name] = {"file_name": f"{name}.json", "columns": columns}
    registry["again"]["num_samples"] = SAMPLED
    (made / "dataset_info.json").write_text(json.dumps(registry))
    return made


def sources(config: dict[str, Any]) -> list[mix.Source]:
    names = config["dataset"].split(",")
    return [mix.Source(n, SETS[n], SAMPLED if n == "again" else None) for n in names]


def config_of(folder: Path, model: Path, change: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset_dir": str(folder),
        "template": "smollm",
        "cutoff_len": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3.0,
        **change,
    }


def steps_by_the_trainer(arguments: Any, dataset: Any) -> int:
    """transformers' own count, of the batches a training of one process makes."""
    loader = DataLoader(
        list(range(len(dataset))),
        batch_size=arguments.per_device_train_batch_size,
        drop_last=arguments.dataloader_drop_last,
    )
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    trainer = SimpleNamespace(num_examples=lambda loader: len(loader.dataset))
    found = transformers.Trainer.set_initial_training_values(trainer, arguments, loader, batch)
    return int(found[-1])


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_rows_and_steps_are_those_of_the_training(
    folder: Path, base_model: Path, tmp_path: Path, number: int
) -> None:
    config = config_of(folder, base_model, COMBINATIONS[number])
    pipeline = DataPipeline.of(config, str(tmp_path))
    context = (pipeline.model_args, pipeline.data_args, pipeline.training_args)
    merged = _get_merged_dataset(pipeline.data_args.dataset, *context, pipeline.stage)
    said = [row[0]["content"] for row in merged["_prompt"]]
    module = get_dataset(
        pipeline.codec.template,
        *context,
        stage=pipeline.stage,
        tokenizer=pipeline.codec.tokenizer,
        processor=pipeline.codec.processor,
    )
    train = module["train_dataset"]
    steps = steps_by_the_trainer(pipeline.training_args, train)

    made = mix.training_pass(config, sources(config))
    taken = Counter(text.split()[0] for text in said)
    seen = Counter(text.split()[0] for text in set(said))
    for share in made.shares:
        assert (share.taken, share.seen) == (taken[share.key], seen[share.key]), share
    assert made.rows == len(said)
    packed = pipeline.data_args.packing
    if not packed:
        assert made.held_out == len(module.get("eval_dataset", ()))
        assert made.sequences == len(train)
    assert made.steps == (steps if not packed or config.get("max_steps", -1) > 0 else None)

    replayed = replay(config, 1, str(tmp_path)).record()
    assert steps_of(replayed) == steps
    assert replayed["sequences"] == len(train)
    assert replayed["taken"] == dict(taken)
    # num_samples draws other rows each time it is asked.
    if "again" not in config["dataset"] and not (pipeline.stage == "pt" and packed):
        lengths = sum(len(ids) for ids in train["input_ids"])
        assert replayed["tokens_an_epoch"] == lengths


def test_what_stops_the_loader_is_refused(folder: Path, base_model: Path, tmp_path: Path) -> None:
    for change in (
        {"dataset": "few", "val_size": 3},
        {"dataset": "few", "val_size": 0.9},
        {**UNDER, "interleave_probs": "0.3,0.3,0.3"},
    ):
        config = config_of(folder, base_model, change)
        pipeline = DataPipeline.of(config, str(tmp_path))
        context = (pipeline.model_args, pipeline.data_args, pipeline.training_args)
        codec = pipeline.codec
        with pytest.raises(ValueError):
            get_dataset(
                codec.template,
                *context,
                stage="sft",
                tokenizer=codec.tokenizer,
                processor=codec.processor,
            )
        with pytest.raises(UsageError) as refused:
            mix.training_pass(config, sources(config))
        # Followed to the letter, what the hint says is taken.
        key, value = refused.value.hint.split("`")[1].split(": ")
        mended = mix.training_pass(config | {key: value}, sources(config))
        assert (mended.sequences or 0) > 0


def test_what_each_template_takes_is_known() -> None:
    signs = (("images", "image_token"), ("videos", "video_token"), ("audios", "audio_token"))
    theirs = {
        name: tuple(role for role, sign in signs if getattr(template.mm_plugin, sign) is not None)
        for name, template in TEMPLATES.items()
    }
    assert {name: taken for name, taken in theirs.items() if taken} == dict(TAKEN)
