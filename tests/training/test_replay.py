"""The replay says what LLaMA-Factory's own preparation makes of the rows.

Compared are get_dataset as the training calls it, the replay with one worker and with two, and
the preview.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from llamafactory.data.loader import get_dataset

from tunesmith.job.data.preview import preview
from tunesmith.job.data.replay import replay
from tunesmith.job.data.rows import DataPipeline

Sizes = list[tuple[int, int]]


@dataclass(frozen=True)
class Together:
    """A config; the rows' tokens and trained tokens by LLaMA-Factory; what the replay says.

    `same_validation`: the rows it names as held out have the ids of those that are.
    """

    config: dict[str, Any]
    theirs: dict[str, Sizes]
    replayed: dict[str, Any]
    same_validation: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two registered data sets."""
    made = tmp_path_factory.mktemp("replay")
    rows: list[dict[str, str | None]] = [
        {"instruction": f"question {n} " * (n % 7 + 1), "output": f"answer {n} " * (n % 60 + 1)}
        for n in range(2100)  # more than two workers take at once
    ]
    rows[4]["output"] = None
    rows[5]["instruction"] = "what does <|im_end|> mean?"
    (made / "rows.json").write_text(json.dumps(rows))
    talks = [
        {"conversations": [{"from": role, "value": f"{n} {role} " * 9} for role in roles]}
        for n, roles in enumerate([["human", "gpt"], ["human", "gpt"] * 4, ["gpt", "human"]] * 9)
    ]
    (made / "talks.json").write_text(json.dumps(talks))
    columns = {"prompt": "instruction", "response": "output"}
    registry = {
        "rows": {"file_name": "rows.json", "columns": columns},
        "talks": {"file_name": "talks.json", "formatting": "sharegpt"},
    }
    (made / "dataset_info.json").write_text(json.dumps(registry))
    return made


def together(folder: Path, base_model: Path, scratch: Path, **change: Any) -> Together:
    config: dict[str, Any] = {
        "model_name_or_path": str(base_model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "smollm",
        "cutoff_len": 128,
        "val_size": 0.1,
        "seed": 42,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2.0,
    } | change
    pipeline = DataPipeline.of(config, str(scratch))
    transformers.set_seed(42)
    module = get_dataset(
        pipeline.codec.template,
        pipeline.model_args,
        pipeline.data_args,
        pipeline.training_args,
        stage="sft",
        tokenizer=pipeline.codec.tokenizer,
        processor=pipeline.codec.processor,
    )
    sides = [side for side in ("train_dataset", "eval_dataset") if side in module]
    theirs = {
        side: [(len(r["input_ids"]), sum(x != -100 for x in r["labels"])) for r in module[side]]
        for side in sides
    }
    held = [list(row["input_ids"]) for row in module.get("eval_dataset", [])]
    replayed: dict[str, Any] = replay(config, 1, str(scratch)).record()
    places = list(dict.fromkeys(map(tuple, replayed["validation"])))
    table = pipeline.rows([config["dataset"]])[config["dataset"]]
    same = held == [pipeline.encode(table[row - 1])[0] for _, row in places]
    return Together(config, theirs, replayed, same)


@pytest.fixture(scope="module")
def cut(folder: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return together(folder, base_model, tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def talks(folder: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    scratch = tmp_path_factory.mktemp("talks")
    change = {"dataset": "talks", "val_size": 0.0, "mask_history": True}
    return together(folder, base_model, scratch, **change)


@pytest.mark.parametrize("name", ["cut", "talks"])
def test_tokens_and_rows_are_llamafactorys(request: pytest.FixtureRequest, name: str) -> None:
    found: Together = request.getfixturevalue(name)
    theirs = [row for rows in found.theirs.values() for row in rows]
    (part,) = found.replayed["datasets"].values()
    assert part["kept"] == len(theirs)
    assert part["tokens"] == sum(length for length, _ in theirs)
    assert part["trained_tokens"] == sum(trained for _, trained in theirs)
    assert part["rows"] - part["kept"] == part["counts"]["dropped"]
    assert part["counts"]["truncated"] > 0
    train = found.theirs["train_dataset"]
    assert found.replayed["sequences"] == len(train)
    assert found.replayed["tokens_an_epoch"] == sum(length for length, _ in train)


def test_the_held_out_rows_are_llamafactorys(cut: Together) -> None:
    assert len(cut.replayed["validation"]) == len(cut.theirs["eval_dataset"]) == 210
    assert cut.same_validation is True


def test_packing_makes_as_many_sequences(folder: Path, base_model: Path, tmp_path: Path) -> None:
    packed = together(folder, base_model, tmp_path, packing=True, val_size=0.0)
    assert packed.replayed["packing"] is True
    assert packed.replayed["sequences"] == len(packed.theirs["train_dataset"])


@pytest.fixture(scope="module")
def by_two(cut: Together, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What two workers say, and the file with all rows that are told."""
    scratch = tmp_path_factory.mktemp("two")
    rows = scratch / "rows"
    return replay(cut.config, 2, str(scratch), rows).record(), rows


def test_two_workers_say_what_one_says(cut: Together, by_two: tuple[dict[str, Any], Path]) -> None:
    assert by_two[0] == cut.replayed


def test_rows_are_told_with_numbers_and_reasons(
    cut: Together, by_two: tuple[dict[str, Any], Path]
) -> None:
    (part,) = cut.replayed["datasets"].values()
    told = {(item["kind"], item["row"]): item["reason"] for item in part["told"]}
    assert told["dropped", 5] == "no answer that is a string"
    assert "<|im_end|>" in told["control", 6]
    # All of them, where the result holds the first of a kind.
    listed = [json.loads(line) for line in by_two[1].read_text().splitlines()]
    for kind in ("dropped", "truncated", "control"):
        assert part["counts"][kind] == sum(item["kind"] == kind for item in listed)
    assert part["counts"]["truncated"] > 50 == sum(kind == "truncated" for kind, _ in told)
    first_cut = next(reason for (kind, _), reason in told.items() if kind == "truncated")
    assert re.fullmatch(r"\d+ tokens, 128 stay: \d+ of \d+ answer tokens are lost", first_cut)


def test_preview_marks_what_is_trained(cut: Together, tmp_path: Path) -> None:
    # Through JSON, as the control side gets it.
    rows = [asdict(row) for row in preview(cut.config, 3, 2, str(tmp_path))]
    shown = json.loads(json.dumps(rows))
    first, *_ = shown
    assert [row["row"] for row in shown] == [2, 3, 4]
    assert [piece["trained"] for piece in first["pieces"]] == [False, True]
    assert first["pieces"][0]["text"].endswith("<|im_start|>assistant\n")
    assert first["pieces"][1]["text"] == "answer 1 answer 1 <|im_end|>\n"
    assert first["trained"] == first["pieces"][1]["tokens"]
