"""What a training and a prediction tell of rows that were cut, from the ids LLaMA-Factory made."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llamafactory.data.loader import get_dataset

from tunesmith.job.data.cuts import CutReport, Cuts, count
from tunesmith.job.data.replay import replay
from tunesmith.job.data.rows import DataPipeline
from tunesmith.job.run.failures import JobError

CUTOFF = 40


@pytest.fixture(scope="module")
def prepared(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows of a training with every other answer too long, and what the replay says of them."""
    folder = tmp_path_factory.mktemp("cuts")
    rows = [
        {"instruction": f"question {n}", "output": "an answer " * (60 if n % 2 else n % 7 + 1)}
        for n in range(1200)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "response": "output"}
    registry = {"rows": {"file_name": "rows.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    config = {
        "model_name_or_path": str(base_model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "smollm",
        "cutoff_len": CUTOFF,
    }
    pipeline = DataPipeline.of(config, str(folder / "scratch"))
    module = get_dataset(
        pipeline.codec.template,
        pipeline.model_args,
        pipeline.data_args,
        pipeline.training_args,
        stage="sft",
        tokenizer=pipeline.codec.tokenizer,
        processor=pipeline.codec.processor,
    )
    replayed = replay(config, 1, str(folder / "scratch")).record()
    return {"config": config, "rows": module["train_dataset"], "replayed": replayed}


def test_rows_cut_are_those_of_the_replay(prepared: dict[str, Any]) -> None:
    counts = prepared["replayed"]["datasets"]["rows"]["counts"]
    assert count(prepared["rows"], CUTOFF) == Cuts(1200, counts["truncated"], 0)
    assert counts["truncated"] == 600
    # A part of the rows, in another order, as val_size leaves them.
    part = prepared["rows"].train_test_split(test_size=0.5, seed=1)["train"]
    full = sum(len(ids) == CUTOFF for ids in part["input_ids"])
    assert count(part, CUTOFF) == Cuts(600, full, 0)


def test_a_stream_is_not_counted(prepared: dict[str, Any]) -> None:
    assert count(prepared["rows"].to_iterable_dataset(), CUTOFF) is None


class Told:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        assert event == "note"
        self.notes.append(fields["text"])


def begin(rows: Any, config: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    told = Told()
    report = CutReport.of(config, told)
    state = SimpleNamespace(is_world_process_zero=True)
    loader = SimpleNamespace(dataset=rows)
    report.on_train_begin(None, state, None, train_dataloader=loader)
    return told.notes, report.record()


def test_a_training_tells_what_was_cut(prepared: dict[str, Any]) -> None:
    notes, record = begin(prepared["rows"], prepared["config"])
    (note,) = notes
    assert note.startswith(f"600 of 1200 rows fill cutoff_len {CUTOFF}")
    assert record == {"cuts": {"rows": 1200, "full": 600, "untrained": 0, "cutoff_len": CUTOFF}}
    assert begin(prepared["rows"], {**prepared["config"], "packing": True}) == ([], {})
    assert begin(prepared["rows"], {**prepared["config"], "cutoff_len": 99})[0] == []


def test_rows_without_a_token_to_learn(prepared: dict[str, Any]) -> None:
    def forget(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"labels": [-100] * len(row["labels"]) if index < 30 else row["labels"]}

    rows = prepared["rows"].select(range(40)).map(forget, with_indices=True)
    notes, _ = begin(rows, {**prepared["config"], "cutoff_len": 99})
    assert notes == ["30 of 40 rows have no token to train on"]
    with pytest.raises(JobError, match="none of 30 rows has a token to train on") as refused:
        begin(rows.select(range(30)), prepared["config"])
    assert refused.value.failure == "data"


def test_a_prediction_tells_of_its_prompts(prepared: dict[str, Any]) -> None:
    told = Told()
    report = CutReport.of(prepared["config"], told)
    # Prompts and expected answers share cutoff_len (data/processor/unsupervised.py).
    halves = (
        prepared["rows"]
        .select(range(4))
        .map(lambda row: {"input_ids": row["input_ids"][:15], "labels": row["input_ids"][15:]})
    )
    state, loader = SimpleNamespace(is_world_process_zero=True), SimpleNamespace(dataset=halves)
    arguments = SimpleNamespace(predict_with_generate=True)
    for _ in range(3):
        report.on_prediction_step(arguments, state, None, eval_dataloader=loader)
    (note,) = told.notes
    assert note.startswith("2 of 4 prompts or expected answers fill cutoff_len")
