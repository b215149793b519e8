"""How rows are read and become ids: with what that needs and no more, and the rows are the same."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, arrow_writer
from llamafactory.data import loader
from llamafactory.data.parser import DatasetAttr
from transformers import AutoTokenizer

from tunesmith.core.patching import install, installed, uninstall
from tunesmith.job.patches import tokenizing
from tunesmith.job.patches.datasets import INFER_TYPE_ONCE, REMEMBER_TYPE
from tunesmith.job.patches.llamafactory import CONVERT_IN_BATCHES
from tunesmith.job.patches.transformers import ENCODE_STRAIGHT

PROGRAMS = Path(__file__).parent / "programs"


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": "[]"}


ALPACA: list[dict[str, Any]] = [
    {"instruction": "Who?", "input": "you", "output": "A lamp.", "system": "Be.", "history": None},
    {"instruction": "谁？", "input": "", "output": "灯。", "system": "", "history": [["a", "b"]]},
    {"instruction": "", "input": "", "output": None, "system": None, "history": []},
] * 700  # more than a batch
SHAREGPT = [
    talk(("human", "Who?"), ("gpt", "A lamp.")),
    talk(
        ("system", "Be."),
        ("human", "Who?"),
        ("function_call", "{}"),
        ("observation", "1"),
        ("gpt", "A lamp."),
    ),
    talk(("gpt", "not their turn"), ("human", "Who?")),
    talk(),
] * 400
RANKED: list[dict[str, Any]] = [
    {"instruction": "Who?", "input": "", "chosen": "A lamp.", "rejected": "No."}
] * 3
PICTURED: list[dict[str, Any]] = [
    {"instruction": "What?", "input": "", "output": "It.", "images": ["a.png"]},
    {"instruction": "What?", "input": "", "output": "It.", "images": []},
]
JUDGED: list[dict[str, Any]] = [
    {"instruction": "Who?", "input": "", "output": "A lamp.", "kto_tag": True},
    {"instruction": "Who?", "input": "", "output": "No.", "kto_tag": False},
]
CASES: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (ALPACA, {"system": "system", "history": "history"}),
    (SHAREGPT, {"formatting": "sharegpt", "tools": "tools"}),
    (RANKED, {"ranking": True, "chosen": "chosen", "rejected": "rejected"}),
    (PICTURED, {"images": "images"}),
    (JUDGED, {"kto_tag": "kto_tag"}),
]


def convert(rows: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    """Return rows as LLaMA-Factory converts them."""
    attributes = DatasetAttr("file", "rows")
    for key, value in options.items():
        setattr(attributes, key, value)
    data_args = SimpleNamespace(
        streaming=False, preprocessing_num_workers=None, overwrite_cache=True, media_dir="."
    )
    training_args = SimpleNamespace(local_process_index=0)
    return loader.align_dataset(Dataset.from_list(rows), attributes, data_args, training_args)


def all_cases() -> list[Any]:
    made = [convert(rows, options) for rows, options in CASES]
    return [(one.features, one.data.schema.types, one.to_list()) for one in made]


def failure() -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as raised:
        convert([{"instruction": 1}], {})
    return type(raised.value), str(raised.value)


def test_rows_converted_together_are_those_converted_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    usual_map, usual_make = Dataset.map, arrow_writer.TypedSequence.__arrow_array__

    def counted_map(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append("batch" if options["batched"] else "row")
        return usual_map(self, *arguments, **options)

    def counted_make(self: Any, type: Any = None) -> Any:
        calls.append("column")
        return usual_make(self, type)

    monkeypatch.setattr(Dataset, "map", counted_map)
    monkeypatch.setattr(arrow_writer.TypedSequence, "__arrow_array__", counted_make)
    theirs = all_cases()
    columns = calls.count("column")
    failed = failure()
    assert "batch" not in calls

    calls.clear()
    with installed(CONVERT_IN_BATCHES):
        assert all_cases() == theirs
        assert "row" not in calls
        assert calls.count("column") == columns
        assert failure() == failed

    calls.clear()
    tokenizing.hasten()
    try:
        assert gc.get_freeze_count() > 100_000
        assert all_cases() == theirs
        # And each column is made once, not a second time to see its type.
        assert columns == 2 * calls.count("column")
        assert failure() == failed
    finally:
        gc.unfreeze()
        for patch in (ENCODE_STRAIGHT, CONVERT_IN_BATCHES, REMEMBER_TYPE, INFER_TYPE_ONCE):
            uninstall(patch)


@pytest.mark.parametrize(("place", "loaded"), [("here", "False"), ("anywhere", "True")])
def test_files_of_this_machine_are_read_without_the_networks_readers(
    tmp_path: Path, place: str, loaded: str
) -> None:
    argv = [sys.executable, str(PROGRAMS / "read_local_files.py"), str(tmp_path), place]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == loaded


@pytest.mark.parametrize("model", ["base_model", "r1_model"])
def test_quick_ids_are_the_usual_ids(request: pytest.FixtureRequest, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(model))
    special = [*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values()]
    texts = ["", " ", "Who are you?\n", "你是谁？", "e\u0301 \U0001f9d1\u200d\U0001f680"]
    texts += ["\x00\ufffd", *(f"a{token} b" for token in map(str, special))]
    texts += [text * 3000 for text in texts]

    def ids(split: bool) -> list[list[int]]:
        tokenizer.split_special_tokens = split
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def others() -> list[list[int]]:
        cut = tokenizer.encode("one two three four", truncation=True, max_length=2)
        return [cut, tokenizer.encode("one", "two"), *ids(False), tokenizer.encode("one")]

    before = [ids(False), ids(True), others()]
    with installed(ENCODE_STRAIGHT):
        install(ENCODE_STRAIGHT)  # once more changes nothing
        assert [ids(False), ids(True), others()] == before


def test_a_quantised_layer_still_gets_its_own_kind_of_adapter() -> None:
    argv = [sys.executable, str(PROGRAMS / "quantised_adapter.py")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == [
        "peft.tuners.lora.layer peft.tuners.lora.bnb",
        "Linear4bit False",
    ]
