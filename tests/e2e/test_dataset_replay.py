"""The replay says what LLaMA-Factory's own preparation makes of the rows; the verbs work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.check import check_file
from tunesmith.dataset.registry import load_registry, register
from tunesmith.dataset.split import split
from tunesmith.dataset.tables import tables_of
from tunesmith.project import Project

pytestmark = pytest.mark.e2e

# One process: LLaMA-Factory's get_dataset as the training calls it, the replay with one
# worker and with two, the preview.
TOGETHER = """
import dataclasses, json, sys, tempfile
import transformers
from pathlib import Path
from llamafactory.data.loader import get_dataset
from tunesmith.job.data.preview import preview
from tunesmith.job.data.replay import replay
from tunesmith.job.data.rows import DataPipeline

asked = json.load(open(sys.argv[1]))
found = {}
for name, config in asked.items():
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = DataPipeline.of(config, scratch)
        transformers.set_seed(42)
        module = get_dataset(
            pipeline.codec.template, pipeline.model_args, pipeline.data_args,
            pipeline.training_args,
            stage="sft", tokenizer=pipeline.codec.tokenizer, processor=pipeline.codec.processor,
        )
        theirs = {
            side: [[len(r["input_ids"]), sum(x != -100 for x in r["labels"])] for r in module[side]]
            for side in ("train_dataset", "eval_dataset") if side in module
        }
        held = [list(r["input_ids"]) for r in module.get("eval_dataset", [])]
        one = replay(config, 1, scratch).record()
        ours = {tuple(place): None for place in one["validation"]}
        table = pipeline.rows([config["dataset"]])[config["dataset"]]
        same = held == [pipeline.encode(table[row - 1])[0] for _, row in ours]
        cut = name == "cut"
        two = replay(config, 2, scratch, Path(sys.argv[3])).record() if cut else None
        rows = [dataclasses.asdict(r) for r in preview(config, 3, 2, scratch)] if cut else None
        found[name] = {
            "theirs": theirs, "one": one,
            "two": two,
            "same_validation": same,
            "preview": rows,
        }
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, base_model: Path
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("replay")
    rows = [
        {"instruction": f"question {n} " * (n % 7 + 1), "output": f"answer {n} " * (n % 60 + 1)}
        for n in range(2100)  # more than two workers take at once
    ]
    rows[4]["output"] = None  # type: ignore[assignment]
    rows[5]["instruction"] = "what does <|im_end|> mean?"
    (folder / "rows.json").write_text(json.dumps(rows))
    talks = [
        {"conversations": [{"from": role, "value": f"{n} {role} " * 9} for role in roles]}
        for n, roles in enumerate([["human", "gpt"], ["human", "gpt"] * 4, ["gpt", "human"]] * 9)
    ]
    (folder / "talks.json").write_text(json.dumps(talks))
    columns = {"prompt": "instruction", "response": "output"}
    registry = {
        "rows": {"file_name": "rows.json", "columns": columns},
        "talks": {"file_name": "talks.json", "formatting": "sharegpt"},
    }
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    config = {
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
    }
    asked = {
        "cut": config,
        "talks": {**config, "dataset": "talks", "val_size": 0.0, "mask_history": True},
        "packed": {**config, "packing": True, "val_size": 0.0},
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [
            training_python,
            "-c",
            TOGETHER,
            *(folder / name for name in ("asked.json", "found", "rows")),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found").read_text())
    found["rows"] = [json.loads(line) for line in (folder / "rows").read_text().splitlines()]
    return found


@pytest.mark.parametrize("name", ["cut", "talks"])
def test_tokens_and_rows_are_llamafactorys(together: dict[str, Any], name: str) -> None:
    found = together[name]
    theirs = [row for rows in found["theirs"].values() for row in rows]
    (part,) = found["one"]["datasets"].values()
    assert part["kept"] == len(theirs)
    assert part["tokens"] == sum(length for length, _ in theirs)
    assert part["trained_tokens"] == sum(trained for _, trained in theirs)
    assert part["rows"] - part["kept"] == part["counts"]["dropped"]
    assert part["counts"]["truncated"] > 0
    train = found["theirs"]["train_dataset"]
    assert found["one"]["sequences"] == len(train)
    assert found["one"]["tokens_an_epoch"] == sum(length for length, _ in train)


def test_the_held_out_rows_are_llamafactorys(together: dict[str, Any]) -> None:
    found = together["cut"]
    assert len(found["one"]["validation"]) == len(found["theirs"]["eval_dataset"]) == 210
    assert found["same_validation"] is True


def test_packing_makes_as_many_sequences(together: dict[str, Any]) -> None:
    found = together["packed"]
    assert found["one"]["packing"] is True
    assert found["one"]["sequences"] == len(found["theirs"]["train_dataset"])


def test_two_workers_say_what_one_says(together: dict[str, Any]) -> None:
    assert together["cut"]["one"] == together["cut"]["two"]


def test_rows_are_told_with_numbers_and_reasons(together: dict[str, Any]) -> None:
    (part,) = together["cut"]["one"]["datasets"].values()
    told = {(item["kind"], item["row"]): item["reason"] for item in part["told"]}
    assert told["dropped", 5] == "no answer that is a string"
    assert "<|im_end|>" in told["control", 6]
    listed = together["rows"]  # all of them, where the result holds the first of a kind
    for kind in ("dropped", "truncated", "control"):
        assert part["counts"][kind] == sum(item["kind"] == kind for item in listed)
    assert part["counts"]["truncated"] > 50 == sum(kind == "truncated" for kind, _ in told)
    cut = next(reason for (kind, _), reason in told.items() if kind == "truncated")
    assert re.fullmatch(r"\d+ tokens, 128 stay: \d+ of \d+ answer tokens are lost", cut)


def test_preview_marks_what_is_trained(together: dict[str, Any]) -> None:
    first, *_ = together["cut"]["preview"]
    assert [row["row"] for row in together["cut"]["preview"]] == [2, 3, 4]
    assert [piece["trained"] for piece in first["pieces"]] == [False, True]
    assert first["pieces"][0]["text"].endswith("<|im_start|>assistant\n")
    assert first["pieces"][1]["text"] == "answer 1 answer 1 <|im_end|>\n"
    assert first["trained"] == first["pieces"][1]["tokens"]


def inv(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [Path(sys.executable).with_name("inv"), *words]
    return subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("base_model")
def test_check_of_a_config_tells_rows_tokens_time_and_cost(root: Path, tmp_path: Path) -> None:
    config = "configs/train/smollm2_135m_lora_sft.yaml"
    words = ["--gpu", "RTX4090", "--price", "1.98/h", "--picture", str(tmp_path / "x.png")]
    done = inv(root, "data.check", "--config", config, *words, "cutoff_len=60")
    assert done.returncode == 0, done.stderr
    assert "philosophy_conch: 120 rows, 120 kept, 0 dropped" in done.stdout
    assert re.search(
        r"cut at cutoff_len 60: [\d.]+% of the rows; cutoff_len \d+ keeps", done.stdout
    )
    assert re.search(r"\d+ steps; on one RTX4090 about .* cost [\d.]+ to [\d.]+ \(an", done.stdout)
    assert "validation: 12 rows" in done.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("base_model")
def test_preview_in_a_pipe(root: Path) -> None:
    done = inv(root, "data.preview", "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "--- row 1 of philosophy_conch: " in done.stdout
    assert re.search(r"<\|im_start\|>assistant\n\[\[我是 philosophy.*\]\]", done.stdout, re.DOTALL)


def test_csv_is_registered_and_split(
    tmp_path: Path, project: Project, training_python: Path
) -> None:
    tables = tables_of(training_python, {})
    path = tmp_path / "rows.csv"
    lines = [f'"question {n}, please","answer {n * 7919}"' for n in range(20)]
    path.write_text("instruction,output\n" + "\n".join(lines) + "\n")
    with pytest.raises(UsageError, match="inv stack"):
        register(tmp_path, "rows", path)
    entry = register(tmp_path, "rows", path, tables=tables)
    assert entry.columns == {"prompt": "instruction", "response": "output"}
    made = split(tmp_path, "rows", 0.25, 1, tables=tables)
    assert (made.train.rows, made.validation.rows) == (15, 5)
    for part in (made.train, made.validation):
        written = load_registry(tmp_path)[str(part.entry.key)]
        assert check_file(part.file, written).kept == part.rows
