"""What is refused before a merge loads any weight."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.job.merge.inputs import check_mergeable, export_keys
from tunesmith.job.merge.phase import check_base, check_room
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.schema import FileRecord, ModelRef

pytestmark = pytest.mark.unit


def make_base(folder: Path, dtype: str = "BF16", **config: Any) -> Path:
    """Write a model folder of one tensor that counts as whole."""
    folder.mkdir()
    shape = (4, 4)
    size = math.prod(shape) * (4 if dtype == "F32" else 2)
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(size)
    (folder / "model.safetensors").write_bytes(weights)
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values | config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("tuning", ["full", "freeze"])
def test_full_tuning_has_nothing_to_merge(tmp_path: Path, tuning: str) -> None:
    config = {"finetuning_type": tuning, "output_dir": "/runs/x/output"}
    with pytest.raises(UsageError, match="no adapter to merge, /runs/x/output is the whole model"):
        check_mergeable(config, make_base(tmp_path / "base"))


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UsageError, match=r"is quantized \(gptq\)"):
        check_mergeable({"finetuning_type": "lora"}, base)


def test_a_changed_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="resize_vocab"):
        check_mergeable({"resize_vocab": True}, make_base(tmp_path / "base"))


def test_a_base_exchanged_since_training_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    record = ModelRef("m/x", files={weights.name: FileRecord(len(content), digest)})
    check_base(base, record)
    weights.write_bytes(content[:-1] + b"\1")
    with pytest.raises(UsageError, match=rf"expected sha256 {digest}") as refused:
        check_base(base, record)
    assert "inv model.fetch m/x" in refused.value.hint


def test_auto_dtype_becomes_the_bases(tmp_path: Path) -> None:
    half, single = make_base(tmp_path / "half"), make_base(tmp_path / "single", dtype="F32")
    assert export_keys({"infer_dtype": "auto"}, half)["infer_dtype"] == "bfloat16"
    assert export_keys({"infer_dtype": "auto"}, single)["infer_dtype"] == "float32"
    assert export_keys({}, single)["infer_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "asked",
    [
        {"infer_dtype": "int8"},
        {"export_legacy_format": True},
        {"export_hub_model_id": "me/model"},
    ],
)
def test_exports_that_cannot_be_proven_are_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(asked))):
        export_keys(asked, make_base(tmp_path / "base"))


def test_paths_of_a_merge_file_give_way_to_the_runs(tmp_path: Path) -> None:
    asked = {"model_name_or_path": "a", "adapter_name_or_path": "b", "export_dir": "c"}
    assert not asked.keys() & export_keys(asked, make_base(tmp_path / "base")).keys()


def test_too_small_a_disk_or_memory_is_named_with_its_class(tmp_path: Path) -> None:
    check_room(tmp_path, disk=1, memory=1)
    with pytest.raises(JobError, match=r"needs 1000000\.0 TB") as disk:
        check_room(tmp_path, disk=10**18, memory=1)
    assert disk.value.failure == "disk_full"
    with pytest.raises(JobError, match=r"needs 1000000\.0 TB of memory") as memory:
        check_room(tmp_path, disk=1, memory=10**18)
    assert memory.value.failure == "host_oom"
