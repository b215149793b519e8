"""A base model folder: each way to be broken is found, with file, expected and found."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubserver import safetensors, tiny_model
from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.files import FileRecord, Problem
from tunesmith.core.errors import UsageError

pytestmark = pytest.mark.unit

WEIGHTS = "model.safetensors"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in tiny_model().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def shards(folder: Path) -> Path:
    (folder / WEIGHTS).unlink()
    (folder / FIRST).write_bytes(safetensors({"a": (4, 4)}))
    (folder / SECOND).write_bytes(safetensors({"b": (2,), "c": (3,)}))
    where = {"a": FIRST, "b": SECOND, "c": SECOND}
    (folder / model_files.INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_whole_folder_has_no_problem(folder: Path) -> None:
    assert model_files.verify(folder) == ()
    model_files.require(folder)


def test_a_sharded_folder_has_no_problem(shards: Path) -> None:
    assert model_files.verify(shards) == ()


def test_shapes_are_read_from_the_headers(shards: Path) -> None:
    assert model_files.tensor_shapes(shards) == {
        "a": ("F32", (4, 4)),
        "b": ("F32", (2,)),
        "c": ("F32", (3,)),
    }


def _cut(path: Path, rest: int) -> None:
    path.write_bytes(path.read_bytes()[:rest])


def _reheader(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        new = struct.pack("<Q", len(text)) + text + data[8 + length :]
        (folder / WEIGHTS).write_bytes(new)

    return apply


@pytest.mark.parametrize(
    ("damage", "file", "fault"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json", "missing"),
        (lambda f: (f / "config.json").write_text("{,}"), "config.json", "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json", "not a JSON object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json", "is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json", "no model_type"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
        (lambda f: _cut(f / "tokenizer.json", 9), "tokenizer.json", "is not JSON"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json", "missing"),
        (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "no weights"),
        (lambda f: _cut(f / WEIGHTS, 0), WEIGHTS, "is no safetensors file"),
        (lambda f: _cut(f / WEIGHTS, 40), WEIGHTS, "is cut: expected at least"),
        (lambda f: _cut(f / WEIGHTS, -10), WEIGHTS, "is cut: expected"),
        (lambda f: (f / WEIGHTS).open("ab").write(b"x"), WEIGHTS, "is too long: expected"),
        (lambda f: (f / WEIGHTS).write_bytes(b"<html>" * 9), WEIGHTS, "is no safetensors file"),
        (_reheader(lambda h: h["b.weight"].update(dtype="F99")), WEIGHTS, "unknown dtype F99"),
        (_reheader(lambda h: h["b.weight"].update(shape=[5])), WEIGHTS, "does not take"),
        (_reheader(lambda h: h["b.weight"].pop("shape")), WEIGHTS, "damaged header"),
        (_reheader(lambda h: h.pop("a.weight")), WEIGHTS, "b.weight begins at 65536, expected 0"),
    ],
)
def test_damage_is_named(
    folder: Path, damage: Callable[[Path], object], file: str, fault: str
) -> None:
    damage(folder)
    problems = model_files.verify(folder)
    assert [p.file for p in problems] == [file]
    assert fault in problems[0].fault


def test_a_cut_shard_is_named_with_both_sizes(shards: Path) -> None:
    size = (shards / SECOND).stat().st_size
    _cut(shards / SECOND, size - 3)
    assert model_files.verify(shards) == (
        Problem(SECOND, f"is cut: expected {size} bytes, found {size - 3}"),
    )
    with pytest.raises(UsageError) as caught:
        model_files.require(shards, "org/tiny")
    assert "inv model.fetch org/tiny" in caught.value.hint
    assert SECOND in caught.value.message


def test_the_index_and_the_shards_must_agree(shards: Path) -> None:
    (shards / SECOND).write_bytes(safetensors({"b": (2,)}))
    assert model_files.verify(shards) == (
        Problem(SECOND, "lacks 1 tensors the index puts there, first c"),
    )
    (shards / SECOND).unlink()
    assert model_files.verify(shards) == (
        Problem(SECOND, f"missing, named in {model_files.INDEX}"),
    )
    (shards / model_files.INDEX).write_text('{"weight_map": {}}')
    assert "weight_map" in model_files.verify(shards)[0].fault


def test_expected_size_and_sha256_are_compared(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    right = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    assert model_files.verify(folder, {WEIGHTS: right}, hashes=True) == ()
    longer = FileRecord(len(data) + 1, right.sha256)
    assert model_files.verify(folder, {WEIGHTS: longer}) == (
        Problem(WEIGHTS, f"expected {len(data) + 1} bytes, found {len(data)}"),
    )
    # The last bit of a weight: nothing but the hash can see it.
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert model_files.verify(folder, {WEIGHTS: right}) == ()
    (problem,) = model_files.verify(folder, {WEIGHTS: right}, hashes=True)
    assert problem.fault.startswith(f"expected sha256 {right.sha256}, found ")
    (problem,) = model_files.verify(folder, {"more.json": right})
    assert problem == Problem("more.json", f"missing, expected {len(data)} bytes")


def test_all_faults_come_in_one_report(folder: Path) -> None:
    (folder / "config.json").unlink()
    _cut(folder / WEIGHTS, 50)
    with pytest.raises(UsageError) as caught:
        model_files.require(folder)
    assert "(and 1 more)" in caught.value.message
    assert len(caught.value.detail) == 2


def test_no_folder_is_a_problem(tmp_path: Path) -> None:
    (problem,) = model_files.verify(tmp_path / "nothing")
    assert problem.fault == "is not a folder"


def test_pickled_weights_alone_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    (problem,) = model_files.verify(folder)
    assert "only pickled weights" in problem.fault
    assert model_files.verify(folder, allow_pickle=True) == ()


def test_what_is_taken_of_a_repository() -> None:
    names = [
        *("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt"),
        *("chat_template.jinja", "qwen.tiktoken", FIRST, SECOND, model_files.INDEX),
        *("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"),
        *("pytorch_model.bin.index.json", "tf_model.h5", "modeling_x.py", "README.md", "a.txt"),
        *("onnx/config.json", "../x.json", ".hidden.json", "-x.json", "training_args.bin"),
    ]
    assert model_files.choose(names) == tuple(sorted(names[:10]))


def test_pickles_are_taken_only_where_there_is_nothing_else() -> None:
    names = ["config.json", "pytorch_model.bin", "flax_model.msgpack", "a.py"]
    assert model_files.choose(names) == ("config.json",)
    taken = ("config.json", "flax_model.msgpack", "pytorch_model.bin")
    assert model_files.choose(names, allow_pickle=True) == taken
    both = [*names, WEIGHTS]
    assert model_files.choose(both, allow_pickle=True) == ("config.json", WEIGHTS)
