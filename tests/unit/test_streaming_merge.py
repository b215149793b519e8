"""The merge by blocks: every number, what it refuses, and the bundle for a merge elsewhere.

Adapters hold small multiples of powers of two, so that each sum is exact in any order and the
expected bits do not depend on who multiplies.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, sha256_of
from tunesmith.job.merge import blocks, bundle, skeleton, streaming
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.merge.adapter import check_fits
from tunesmith.job.merge.hashing import StreamingHash
from tunesmith.job.merge.matmul import Products, by_mkl, by_numpy
from tunesmith.job.merge.pool import WorkerPool
from tunesmith.job.merge.streaming import UnsupportedMerge, why_not
from tunesmith.job.merge.tensors import Tensor, beginning, stored, stored_below
from tunesmith.job.run.codec import decode
from tunesmith.job.run.schema import ModelRef, RunRequest
from tunesmith.job.system import resources

pytestmark = pytest.mark.unit

HIDDEN, WIDE, VOCAB, RANK = 24, 37, 50, 4
KEYS = {"export_size": 5, "export_device": "cpu", "infer_dtype": "bfloat16"}
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
Arrays = Mapping[str, np.ndarray]


def rounded(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 by its definition: the nearest, ties to the even one."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    high = high + ((low > 0x8000) | ((low == 0x8000) & (high % 2 == 1)))
    return high.astype(np.uint16)


def widened(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def put(file: Path, dtype: str, arrays: Arrays) -> None:
    """Write arrays as a safetensors file; bfloat16 is given as its bits."""
    tensors = {name: Tensor(dtype, array.shape) for name, array in arrays.items()}
    head, starts = beginning(tensors)
    with file.open("wb") as stream_:
        stream_.write(head)
        for name in sorted(starts, key=starts.__getitem__):
            assert stream_.tell() == starts[name]
            stream_.write(arrays[name].tobytes())


def get(file: Path) -> dict[str, np.ndarray]:
    words = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
    found = {}
    for name, tensor in stored(file).items():
        count = int(np.prod(tensor.shape))
        array = np.fromfile(file, words[tensor.dtype], count, offset=tensor.start)
        found[name] = array.reshape(tensor.shape)
    return found


def weights(tied: bool = False) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"model.layers.{layer}.self_attn.q_proj.bias"] = (HIDDEN,)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (WIDE, HIDDEN)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {n: noise.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


def make_base(
    folder: Path, dtype: str = "BF16", *, shards: int = 1, **config: Any
) -> dict[str, np.ndarray]:
    """Write a base model; return its weights in float32, as they are stored."""
    folder.mkdir()
    arrays = weights(tied=bool(config.get("tie_word_embeddings")))
    as_stored = {"BF16": rounded, "F16": lambda a: a.astype(np.float16), "F32": lambda a: a}[dtype]
    raw = {name: as_stored(array) for name, array in arrays.items()}
    names = sorted(raw)
    if shards == 1:
        put(folder / "model.safetensors", dtype, raw)
    else:
        place = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            put(folder / file, dtype, {name: raw[name] for name in names[number::shards]})
            place |= dict.fromkeys(names[number::shards], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    values = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(values | config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    return {n: widened(a) if dtype == "BF16" else a.astype(np.float32) for n, a in raw.items()}


def make_adapter(folder: Path, dtype: str = "F32", **config: Any) -> dict[str, np.ndarray]:
    folder.mkdir()
    noise = np.random.default_rng(2)
    arrays: dict[str, np.ndarray] = {}
    for layer in range(2):
        for module, out in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", WIDE)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            for side, shape in (("A", (RANK, HIDDEN)), ("B", (out, RANK))):
                few = noise.integers(-4, 5, shape).astype(np.float32) / 64
                arrays[f"{name}.lora_{side}.weight"] = few if dtype == "F32" else rounded(few)
    put(folder / "adapter_model.safetensors", dtype, arrays)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | config))
    return arrays


def expected(base: Arrays, adapter: Arrays, scale: float) -> dict[str, np.ndarray]:
    """Return the merged model in float32, before the last rounding."""
    found = {}
    for name, values in base.items():
        lora = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{lora}A.weight" in adapter:
            delta = adapter[f"{lora}B.weight"] @ adapter[f"{lora}A.weight"]
            values = values + delta * np.float32(scale)
        found[name] = values
    return found


def merged(tmp_path: Path, dtype: str = "BF16", export_size: float = 5) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    facts = check_fits(tmp_path / "base", tmp_path / "adapter")
    shards = streaming.predicted_files(tmp_path / "base", dtype, export_size)
    assert shards is not None
    streaming.merge(tmp_path / "base", facts, shards, out, by_numpy())
    return out / "model.safetensors"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows: each matrix here takes several, of unequal length."""
    monkeypatch.setattr(streaming, "_BLOCK", 100)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_bit_is_the_rounded_sum(tmp_path: Path, shards: int, rslora: bool) -> None:
    base = make_base(tmp_path / "base", shards=shards)
    adapter = make_adapter(tmp_path / "adapter", use_rslora=rslora)
    found = get(merged(tmp_path))
    wanted = expected(base, adapter, 8 / RANK**0.5 if rslora else 8 / RANK)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert (found[name] == rounded(values)).all(), name
    moved = sum(bool((found[name] != rounded(base[name])).any()) for name in found)
    assert moved == 4


@pytest.mark.parametrize("stored_as", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("asked", ["BF16", "F16", "F32"])
def test_a_base_of_another_dtype_is_rounded_before_the_sum(
    tmp_path: Path, stored_as: str, asked: str
) -> None:
    def cast(values: np.ndarray) -> np.ndarray:
        if asked == "BF16":
            return widened(rounded(values))
        return values.astype(np.float16 if asked == "F16" else np.float32).astype(np.float32)

    base = {n: cast(a) for n, a in make_base(tmp_path / "base", stored_as).items()}
    wanted = expected(base, make_adapter(tmp_path / "adapter"), 2.0)
    found = get(merged(tmp_path, asked))
    for name, values in wanted.items():
        as_float = widened(found[name]) if asked == "BF16" else found[name].astype(np.float32)
        assert (as_float == cast(values)).all(), name


def test_a_tied_head_is_left_out_and_a_model_too_large_is_asked_for(tmp_path: Path) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=True)
    shards = streaming.predicted_files(tmp_path / "base", "BF16", 5)
    assert shards is not None
    assert "lm_head.weight" not in shards[0].tensors
    assert streaming.predicted_files(tmp_path / "base", "BF16", 1e-9) is None


def test_the_files_may_hold_the_tensors_in_any_arrangement(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter")
    facts = check_fits(tmp_path / "base", tmp_path / "adapter")
    tensors = {n: Tensor("BF16", t.shape) for n, t in stored_below(tmp_path / "base").items()}
    names = sorted(tensors, reverse=True)
    shards = [
        streaming.Shard(f"{part}.safetensors", {n: tensors[n] for n in names[part::2]})
        for part in range(2)
    ]
    out = tmp_path / "out"
    out.mkdir()
    made = streaming.merge(tmp_path / "base", facts, shards, out, by_numpy())
    found = get(out / "0.safetensors") | get(out / "1.safetensors")
    for name, values in expected(base, adapter, 2.0).items():
        assert (found[name] == rounded(values)).all(), name
    assert made.changed == set(facts.targets.values())
    assert made.bytes == sum(file.stat().st_size for file in out.iterdir())


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many tasks, so that every process gets some and they end in another order.
    monkeypatch.setattr(streaming, "_BLOCKS", 1)
    monkeypatch.setattr(streaming, "_COPIED", 50)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    values = expected(make_base(base), make_adapter(adapter), 2.0)
    facts = check_fits(base, adapter)
    shards = streaming.predicted_files(base, "BF16", 5)
    assert shards is not None
    out = tmp_path / "out"
    out.mkdir()
    beside = [base / "config.json", base / "model.safetensors"]
    made = streaming.merge(base, facts, shards, out, by_numpy(), workers, beside, hashed=True)
    found = get(out / "model.safetensors")
    assert all((found[name] == rounded(array)).all() for name, array in values.items())
    assert made.hashes == {path: sha256_of(path) for path in (*beside, out / "model.safetensors")}
    assert made.changed == set(facts.targets.values())
    linear = [n for n in found if n in made.changed]
    kept = sum(array.nbytes for name, array in found.items() if name not in linear)
    assert made.copied == kept


def merge_by(multiply: Any, folder: Path) -> None:
    """Merge in two processes, with a product of the test's own."""
    make_base(folder / "base")
    make_adapter(folder / "adapter")
    facts = check_fits(folder / "base", folder / "adapter")
    shards = streaming.predicted_files(folder / "base", "BF16", 5)
    assert shards is not None
    way = Products("the test's", exact=False, multiply=multiply)
    streaming.merge(folder / "base", facts, shards, folder, way, 2)


def test_what_a_process_meets_is_raised_here(tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        merge_by(broken, tmp_path)


def test_a_process_that_is_killed_is_no_silence(tmp_path: Path) -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TunesmithError, match="ended with exit code -9"):
        merge_by(killed, tmp_path)


def test_no_process_is_left_after_an_error(tmp_path: Path) -> None:
    def slow(_: int) -> None:
        time.sleep(60)

    with pytest.raises(KeyError), WorkerPool(slow, 2) as pool:
        processes = list(pool._processes)
        assert all(process.is_alive() for process in processes)
        raise KeyError
    assert not any(process.is_alive() for process in processes)


def test_a_hash_waits_for_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(300))
    with file.open("r+b") as opened:
        files = [(file, opened.fileno(), 300)]
        with StreamingHash(files, [100, 200, 300]) as hashing:
            for number in (2, 0, 1):  # a reader that does not wait finds zeros
                time.sleep(0.05)
                os.pwrite(opened.fileno(), b"x" * 100, 100 * number)
                hashing.task_done(number)
            found = hashing.hashes()
    assert found == {file: sha256_of(file)}


def test_ties_and_infinities_round_as_hardware_does() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x80008000, 0xFF800000])
    values = bits.astype(np.uint32).view(np.float32).copy()
    out = np.zeros(6, np.uint16)
    with np.errstate(all="ignore"):
        blocks.narrow("BF16", values[:5], out[:5], blocks.Scratch())
    assert [hex(v) for v in out[:5]] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80", "0x8000"]


def test_no_block_is_a_single_row_left_over() -> None:
    # 257 rows in blocks of 128 would leave one, which is summed in another order.
    for rows, columns in itertools.product(range(2, 400), (1, 10**6)):
        parts = list(streaming._parts(rows, columns))
        assert [first for first, _ in parts[1:]] == [last for _, last in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, rows)
        assert min(last - first for first, last in parts) > 1


def test_a_number_that_is_none_is_left_to_peft(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    where = stored(file)["model.layers.0.mlp.up_proj.weight"]
    with file.open("r+b") as open_file:
        open_file.seek(where.start)
        open_file.write(b"\xff\xff")
    make_adapter(tmp_path / "adapter")
    with pytest.raises(UnsupportedMerge, match="NaN"):
        merged(tmp_path)


def test_a_range_is_copied_without_the_kernels_help_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    with_help = sha256_of(merged(tmp_path))
    calls = []

    def refused(*_: Any) -> int:
        calls.append(1)
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refused)
    (tmp_path / "out").rename(tmp_path / "first")
    assert sha256_of(merged(tmp_path)) == with_help
    assert calls


def test_a_full_disk_is_not_taken_for_a_kernel_that_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space left"):
        merged(tmp_path)


def test_an_adapter_that_finds_no_use_is_an_error(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    facts = check_fits(tmp_path / "base", tmp_path / "adapter")
    tensors = dict(stored_below(tmp_path / "base"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(TunesmithError, match=r"layers\.1\.mlp\.up_proj\.weight, which the merged"):
        streaming.merge(
            tmp_path / "base", facts, [streaming.Shard("w", tensors)], tmp_path, by_numpy()
        )


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ({"model.other.weight": Tensor("BF16", (3,))}, "is not in the base"),
        ({"model.norm.weight": Tensor("BF16", (3,))}, r"is \[24\] in the base"),
        ({"model.norm.weight": Tensor("F4", (24,))}, "is F4"),
    ],
)
def test_a_tensor_that_is_not_the_bases_is_left_to_peft(
    tmp_path: Path, tensor: dict[str, Tensor], reason: str
) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    facts = check_fits(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(UnsupportedMerge, match=reason):
        streaming.merge(
            tmp_path / "base", facts, [streaming.Shard("w", tensor)], tmp_path, by_numpy()
        )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"bias": "all"}, "bias=all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    ],
)
def test_what_is_more_than_a_sum_is_left_to_peft(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", **config)
    facts = check_fits(tmp_path / "base", tmp_path / "adapter")
    assert why_not(facts, ["a"], KEYS, {}, tmp_path / "base") == reason


def test_transposed_layers_are_left_to_peft(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    facts = check_fits(tmp_path / "base", tmp_path / "adapter")
    assert why_not(facts, ["a"], KEYS, {}, tmp_path / "base") is None
    file.write_text(json.dumps(LORA | {"fan_in_fan_out": True, "target_modules": ["q_proj"]}))
    with pytest.raises(UsageError, match="does not fit"):  # up_proj is not square
        check_fits(tmp_path / "base", tmp_path / "adapter")


def test_other_reasons_to_leave_it_to_peft(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_base(base)
    make_adapter(tmp_path / "adapter")
    make_adapter(tmp_path / "half", "BF16")
    facts = check_fits(base, tmp_path / "adapter")

    def reason(**changed: Any) -> str:
        given = {"adapters": ["a"], "keys": KEYS, "config": {}} | changed
        return str(why_not(facts, given["adapters"], given["keys"], given["config"], base))

    assert reason() == "None"
    assert reason(adapters=["a", "b"]).startswith("several adapters")
    assert reason(keys=KEYS | {"export_device": "auto"}).startswith("export_device: auto")
    assert reason(config={"mixture_of_depths": "load"}).startswith("mixture_of_depths")
    half = check_fits(base, tmp_path / "half")
    assert str(why_not(half, ["a"], KEYS, {}, base)).endswith("is BF16, not F32")
    arrays = get(tmp_path / "adapter" / "adapter_model.safetensors")
    extra = {"base_model.model.model.norm.lora_magnitude_vector": np.ones(3, np.float32)}
    put(tmp_path / "adapter" / "adapter_model.safetensors", "F32", arrays | extra)
    assert reason() == f"the adapter also contains {next(iter(extra))}"
    (base / "config.json").write_text(
        json.dumps(read_json(base / "config.json") | {"auto_map": {"AutoConfig": "x.Y"}})
    )
    assert reason() == "the model has its own code"


def test_differing_stops_at_the_first_bit(tmp_path: Path) -> None:
    make_base(tmp_path / "base", "F32")
    make_adapter(tmp_path / "adapter")
    new = stored(merged(tmp_path))
    old = stored_below(tmp_path / "base")
    assert streaming.differs(
        old["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"]
    )
    assert not streaming.differs(old["lm_head.weight"], new["lm_head.weight"])


def test_a_library_without_mkl_is_no_way_to_multiply(tmp_path: Path) -> None:
    assert by_mkl(tmp_path / "none.so") is None
    assert not by_numpy().exact


# The bundle: all but the weights, for a merge where LLaMA-Factory is not.

PROMPTS = {"passed": True, "differences": [], "ends": [], "corrected": []}


def prepare(tmp_path: Path) -> tuple[Path, RunRequest]:
    """Write a run as a host leaves it, with a bundle; return it and its request."""
    run = tmp_path / "run"
    base = tmp_path / "base"
    make_base(base)
    run.mkdir()
    make_adapter(run / "output")
    config = {"model_name_or_path": str(base), "output_dir": str(run / "output"), "template": "x"}
    (run / "config.yaml").write_text(json.dumps(config))
    files = {
        file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)}
        for file in base.iterdir()
    }
    request = {"run_id": "r", "model": {"name": "m/x", "files": files}, "merge": dict(KEYS)}
    (run / "run.json").write_text(json.dumps(request))
    folder = run / bundle.FOLDER
    folder.mkdir()
    (folder / "Modelfile").write_text("FROM .")
    shards = streaming.predicted_files(base, "BF16", 5)
    assert shards is not None
    places = {"Modelfile": folder, **dict.fromkeys(("config.json", "tokenizer.json"), base)}
    places["tokenizer_config.json"] = base
    known = {
        name: {"in": "bundle" if place == folder else "base", "sha256": sha256_of(place / name)}
        for name, place in places.items()
    }
    record = {
        "key": bundle.key_of(decode(RunRequest, request), config, KEYS),
        "shards": skeleton.layout_of(shards),
        "prompts": PROMPTS,
        "files": known,
    }
    (folder / bundle.MANIFEST).write_text(json.dumps(record))
    return run, decode(RunRequest, request)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without LLaMA-Factory, as the control environment is one."""
    monkeypatch.setattr(skeleton, "possible", lambda: False)


@pytest.mark.usefixtures("bare")
def test_a_bundle_and_numpy_make_the_whole_model(tmp_path: Path) -> None:
    run, request = prepare(tmp_path)
    told: list[str] = []
    summary = merge_phase.run(run, request, lambda event, **_: told.append(event))
    made = run / "merged"
    manifest = read_json(made / "MANIFEST.json")
    assert manifest["arithmetic"] == summary["arithmetic"] == "numpy"
    assert (made / "Modelfile").read_text() == "FROM ."
    assert set(manifest["files"]) == {
        *("Modelfile", "config.json", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    weights_hash = manifest["files"]["model.safetensors"]["sha256"]
    assert weights_hash == sha256_of(made / "model.safetensors")
    assert (run / "parity.json").is_file()
    assert set(told) == {"progress"}


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("change", ["none", "template", "dtype", "base"])
def test_a_bundle_of_another_merge_is_not_taken(tmp_path: Path, change: str) -> None:
    run, request = prepare(tmp_path)
    if change == "template":
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace('"x"', '"y"'))
    elif change == "dtype":
        request = replace(request, merge={**KEYS, "infer_dtype": "float16"})
    elif change == "base":
        request = replace(request, model=ModelRef("m/x"))
    if change == "none":
        merge_phase.run(run, request, lambda *_, **__: None)
        return
    with pytest.raises(UsageError, match="inv pull --merge-here"):
        merge_phase.run(run, request, lambda *_, **__: None)
    assert not (run / "merged").exists()


@pytest.mark.usefixtures("bare")
def test_a_bundle_whose_file_was_changed_is_refused(tmp_path: Path) -> None:
    run, request = prepare(tmp_path)
    (run / bundle.FOLDER / "Modelfile").write_text("FROM else")
    with pytest.raises(TunesmithError, match="Modelfile: not the file"):
        merge_phase.run(run, request, lambda *_, **__: None)


@pytest.mark.usefixtures("bare")
def test_what_needs_peft_says_where_it_can_be_merged(tmp_path: Path) -> None:
    run, request = prepare(tmp_path)
    file = run / "output" / "adapter_config.json"
    file.write_text(json.dumps(LORA | {"use_dora": True}))
    with pytest.raises(UsageError, match=r"\(use_dora\): `inv merge --on HOST"):
        merge_phase.run(run, request, lambda *_, **__: None)


@pytest.mark.usefixtures("bare")
def test_a_damaged_base_is_found_beside_the_merge(tmp_path: Path) -> None:
    run, request = prepare(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match="expected sha256"):
        merge_phase.run(run, request, lambda *_, **__: None)
    assert not (run / "merged").exists()


def identity_of(file: Path) -> tuple[int, int]:
    """What a file that is written again changes; reading it changes neither."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def after_training(run: Path, request: RunRequest) -> tuple[float | None, list[str]]:
    notes: list[str] = []
    seconds = bundle.after_training(run, request, lambda _, text: notes.append(text))
    return seconds, notes


def test_a_bundle_of_the_same_key_is_not_made_again(tmp_path: Path) -> None:
    run, request = prepare(tmp_path)
    before = identity_of(run / bundle.FOLDER / bundle.MANIFEST)
    seconds, notes = after_training(run, request)
    assert seconds is not None
    assert notes == []
    assert identity_of(run / bundle.FOLDER / bundle.MANIFEST) == before


@pytest.mark.parametrize("case", ["several ranks", "no merge", "full", "quantized", "dora"])
def test_nothing_is_made_and_nothing_said_where_a_merge_would_not_use_it(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, request = prepare(tmp_path)
    shutil.rmtree(run / bundle.FOLDER)
    if case == "several ranks":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    elif case == "no merge":
        request = replace(request, merge=None)
    elif case == "full":
        config = json.loads((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(json.dumps(config | {"finetuning_type": "full"}))
    elif case == "quantized":
        file = tmp_path / "base" / "config.json"
        file.write_text(json.dumps(read_json(file) | {"quantization_config": {"bits": 4}}))
    else:
        file = run / "output" / "adapter_config.json"
        file.write_text(json.dumps(LORA | {"use_dora": True}))
    assert after_training(run, request) == (None, [])
    assert not (run / bundle.FOLDER).exists()


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("deepspeed", "deepspeed changes how models are loaded"),
        ("fsdp", "fsdp changes how models are loaded"),
        ("memory", "of memory are free, 500.0 MB needed"),
        ("died", "an earlier training died while making it"),
    ],
)
def test_where_the_training_process_must_not_make_it_a_note_says_why(
    tmp_path: Path, case: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, request = prepare(tmp_path)
    shutil.rmtree(run / bundle.FOLDER)
    if case == "deepspeed":
        config = json.loads((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(json.dumps(config | {"deepspeed": "ds.json"}))
    elif case == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    elif case == "memory":
        monkeypatch.setattr(resources, "memory_available", lambda: 499_000_000)
    else:
        (run / ".bundle.part").mkdir()
    seconds, notes = after_training(run, request)
    assert seconds is None
    assert [note.endswith(why) for note in notes] == [True], notes
    assert not (run / bundle.FOLDER).exists()
    # What a training that died has left is gone: the next one may try.
    assert not (run / ".bundle.part").exists()


def test_a_file_that_cannot_be_read_costs_no_training(tmp_path: Path) -> None:
    run, request = prepare(tmp_path)
    shutil.rmtree(run / bundle.FOLDER)
    (tmp_path / "base" / "config.json").write_text("{")
    seconds, notes = after_training(run, request)
    assert seconds is None
    assert ["JSONDecodeError" in note for note in notes] == [True], notes


def test_paths_do_not_make_another_key() -> None:
    here = {"template": "x", "model_name_or_path": "/a", "output_dir": "/b", "dataset_dir": "/c"}
    there = {"template": "x", "model_name_or_path": "/d", "output_dir": "e"}
    assert bundle.key_of(RunRequest(), here, KEYS) == bundle.key_of(RunRequest(), there, KEYS)
    assert bundle.key_of(RunRequest(), here, KEYS) != bundle.key_of(
        RunRequest(), here | {"template": "y"}, KEYS
    )
