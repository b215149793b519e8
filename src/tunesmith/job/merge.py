"""Adapter + base model -> merged model, the bytes of LLaMA-Factory's export, whole or not at all.

Plain LoRA is merged block by block (job/stream.py) while another process has LLaMA-Factory write
everything around the weights (job/around.py). What is more than that goes through LLaMA-Factory's
export with the whole model in memory, and is said so.

LLaMA-Factory 0.9.3's export (train/tuner.py, export_model) writes into the folder it is
given and only logs a warning when the tokenizer could not be saved; so everything is written into
a folder of ours, which gets its name RUN/merged after everything in it was checked. Prompt parity
is part of that: a model served with another prompt than it was trained with is not the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import fsync_folder, human_bytes, read_json, sha256_of, write_json
from tunesmith.job import around, inference, kit, manifest, parity, products, resources, stream
from tunesmith.job.adapter import ADAPTER_WEIGHTS, AdapterFacts, check_fits
from tunesmith.job.failures import JobError
from tunesmith.job.pulled import disown_merged
from tunesmith.job.rundir import RunFolder
from tunesmith.job.tensors import stored_below
from tunesmith.modelfiles import FileRecord, require, tensor_shapes, verify

MERGED = "merged"
REFUSED = "merged.refused"
_PART = ".merged.part"
_OLD = ".merged.old"

# Bytes an element of each dtype, and its name in safetensors and in PyTorch.
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ACCEPT = "accept_mismatch"  # of request["merge"]: export although prompts differ
# Who did the sums, where the whole model was in memory.
PEFT = "peft"
_BY_BLOCKS = {"from": "block by block"}
_OURS = ("model_name_or_path", "adapter_name_or_path", "export_dir", "finetuning_type", ACCEPT)


def run(run_dir: Path, request: dict[str, Any], emit: Callable[..., None]) -> dict[str, Any]:
    """Merge RUN/output into its base model as RUN/merged; return where it lies and its size.

    The keys of request["merge"] are LLaMA-Factory's export keys. Raises UsageError when there
    is nothing that can be merged (full or freeze tuning, quantised or damaged base, adapter of
    another base), JobError when memory or disk do not suffice, TunesmithError when the export
    is not complete, or when a way to the model puts another prompt before it than the training
    did and request["merge"]["accept_mismatch"] is not true (RUN/parity.json says which). A merged
    model of an earlier call stays until the new one is whole.
    """
    started = time.monotonic()
    config = inference.read_config(run_dir)
    base, output = Path(config["model_name_or_path"]), Path(config["output_dir"])

    def step(done: int) -> None:
        emit("progress", phase="merge", done=done, total=5, unit="steps")

    step(0)
    check_mergeable(config, base)
    require(base, request.get("model", {}).get("name"))
    adapters = inference.tuned_adapters(config, output)
    facts = [check_fits(base, Path(folder)) for folder in adapters][-1]
    step(1)
    keys = export_keys(request.get("merge", {}), base)
    if keys["infer_dtype"] != request.get("merge", {}).get("infer_dtype", keys["infer_dtype"]):
        emit(
            "changed",
            what="infer_dtype",
            to=keys["infer_dtype"],
            why="auto writes float32 on a machine without a GPU",
            **{"from": "auto"},
        )
    task = _Task(run_dir, run_dir / _PART, request, config, base, adapters, facts, keys, step)
    size = parameter_count(base) * SIZES[keys["infer_dtype"]]
    _clear(task.part)
    try:
        # The hashes are read beside the merge, which reads the same bytes; both must succeed.
        with ThreadPoolExecutor(2) as beside:
            whole = beside.submit(check_base, base, request.get("model", {}))
            try:
                made = _merge(task, size, emit, beside)
            finally:
                whole.result()  # a damaged base explains whatever else went wrong
        check_complete(task.part, base, facts, keys["infer_dtype"])
        step(3)
        prompts = _judged(task, made.prompts)
        for correction in prompts["corrected"]:
            why = "so that the prompt is the trained one"
            emit("changed", what=correction["file"], to="ours", why=why, **{"from": "exported"})
        step(4)
        manifest.write(task.part, _made_of(task, prompts, made.arithmetic), made.hashes)
        _put_in_place(task.part, run_dir / MERGED)
    finally:
        shutil.rmtree(task.part, ignore_errors=True)
    step(5)
    return {
        "folder": str(run_dir / MERGED),
        "bytes": sum(file.stat().st_size for file in (run_dir / MERGED).iterdir()),
        "dtype": keys["infer_dtype"],
        "base": str(base),
        "rank": facts.rank,
        "alpha": facts.alpha,
        "scale": facts.scale,
        "targets": len(facts.targets),
        "parity": prompts["passed"],
        "corrected": [correction["file"] for correction in prompts["corrected"]],
        "arithmetic": made.arithmetic,
        "seconds": round(time.monotonic() - started, 1),
    }


@dataclass(frozen=True)
class _Task:
    """What one merge works with."""

    run_dir: Path
    part: Path
    request: Mapping[str, Any]
    config: Mapping[str, Any]
    base: Path
    adapters: list[str]
    facts: AdapterFacts
    keys: Mapping[str, Any]
    step: Callable[[int], None]


@dataclass(frozen=True)
class _Made:
    """What a merge left: the prompts' comparison, who did the sums, known sha256 of files."""

    prompts: dict[str, Any]
    arithmetic: str
    hashes: Mapping[str, str] = field(default_factory=dict)


def _merge(task: _Task, size: int, emit: Callable[..., None], beside: Executor) -> _Made:
    """Merge into task.part, block by block where that is the whole truth. `size` in bytes."""
    reason = stream.why_not(task.facts, task.adapters, task.keys, task.config, task.base)
    disk = int(1.2 * size)
    if reason is None:
        check_room(task.run_dir, disk=disk, memory=_memory(task))
        try:
            return _stream(task, beside)
        except stream.Uncovered as other:
            reason = str(other)
            _clear(task.part)
    if not around.possible():
        raise UsageError(_only_whole(task.run_dir, reason))
    emit("changed", what="merge", to="whole model in memory, by PEFT", why=reason, **_BY_BLOCKS)
    check_room(task.run_dir, disk=disk, memory=int(1.2 * size) + 1_000_000_000)
    around.record_versions(task.run_dir)
    _export(task.config, task.keys, task.adapters, task.part)
    task.step(2)
    codec = inference.codec(inference.arguments(task.config))
    return _Made(parity.align(task.config, codec, task.part), PEFT)


def _stream(task: _Task, beside: Executor) -> _Made:
    """Write the weights here while another process writes what is around them."""
    dtype = SAFETENSORS_NAMES[task.keys["infer_dtype"]]
    way = products.best()
    with _around(task) as other:
        shards = stream.guessed(task.base, dtype, float(task.keys["export_size"])) or other.files()
        stream.merge(task.base, task.facts, shards, task.part, way)
        if shards != other.files():
            for shard in shards:
                (task.part / shard.file).unlink()
            stream.merge(task.base, task.facts, other.files(), task.part, way)
        task.step(2)
        # While the prompts are compared: nothing changes these files any more.
        written = [task.part / shard.file for shard in other.files()]
        hashes = [beside.submit(_synced, file) for file in written]
        prompts = other.prompts()
        known = {file.name: one.result() for file, one in zip(written, hashes, strict=True)}
        return _Made(prompts, way.name, known)


def _synced(file: Path) -> str:
    """Bring a file to disk and return its sha256."""
    _fsync(file)
    return sha256_of(file)


@contextlib.contextmanager
def _around(task: _Task) -> Iterator[around.Around | kit.Kit]:
    """Give who knows everything but the weights: the run's kit, else LLaMA-Factory."""
    key = kit.key_of(task.request, task.config, task.keys)
    made = kit.find(task.run_dir, task.part, task.base, Path(task.adapters[-1]), key)
    if made:
        yield made
        return
    if not around.possible():
        raise UsageError(
            f"{task.run_dir / kit.FOLDER}: nothing there for this merge, and LLaMA-Factory is not "
            "installed here: `inv pull --merge-here` brings it from the host, `inv stack.install` "
            "makes the training environment"
        )
    with around.begin(task.run_dir, task.part, task.config, task.keys) as other:
        yield other


def _memory(task: _Task) -> int:
    """Return the bytes of memory a merge by blocks takes, LLaMA-Factory beside it included."""
    return around.MEMORY if around.possible() else stream.MEMORY


def keep_kit(run_dir: Path) -> None:
    """Make RUN/around, for a merge on another machine. Raises what keeps the run from merging."""
    request = RunFolder(run_dir).request()
    config = inference.read_config(run_dir)
    base, output = Path(config["model_name_or_path"]), Path(config["output_dir"])
    check_mergeable(config, base)
    adapters = inference.tuned_adapters(config, output)
    facts = [check_fits(base, Path(folder)) for folder in adapters][-1]
    keys = export_keys(request.get("merge", {}), base)
    reason = stream.why_not(facts, adapters, keys, config, base)
    if reason:
        raise UsageError(_only_whole(run_dir, reason))
    key = kit.key_of(request, config, keys)
    adapter = Path(adapters[-1])
    with kit.alone(run_dir):
        if kit.find(run_dir, run_dir, base, adapter, key) is None:
            kit.keep(run_dir, config, keys, key, base, adapter)


def _only_whole(run_dir: Path, reason: str) -> str:
    return (
        f"run {run_dir.name} merges only with the whole model in memory ({reason}): "
        f"`inv merge --on HOST --run {run_dir.name}` does it there, then "
        f"`inv pull --on HOST --run {run_dir.name} --what merged`"
    )


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _judged(task: _Task, found: dict[str, Any]) -> dict[str, Any]:
    """Write RUN/parity.json, and stop here if a prompt still differs."""
    accepted = bool(task.request.get("merge", {}).get(ACCEPT))
    found["accepted"] = accepted and not found["passed"]
    write_json(task.run_dir / "parity.json", found)
    if not found["passed"] and not accepted:
        faults = parity.faults_of(found)
        raise TunesmithError(
            f"the merged model would not be asked as it was trained: {faults[0]}; "
            f"{parity.advice(task.config, found)}, or export it all the same: "
            f"`inv merge --run {task.run_dir.name} --accept-mismatch`",
            faults[1:],
        )
    return found


def _made_of(task: _Task, prompts: Mapping[str, Any], arithmetic: str) -> dict[str, Any]:
    """Return what the manifest says of the model's origin; no path of this machine."""
    model = task.request.get("model", {})
    facts = task.facts
    return {
        "run": task.run_dir.name,
        "base": {key: model.get(key) for key in ("name", "revision", "files")},
        "adapters": [
            {"sha256": sha256_of(Path(folder) / ADAPTER_WEIGHTS), "name": Path(folder).name}
            for folder in task.adapters
        ],
        "lora": {"rank": facts.rank, "alpha": facts.alpha, "scale": facts.scale},
        "dtype": task.keys["infer_dtype"],
        "arithmetic": arithmetic,
        "parity": prompts["passed"],
        "corrected": [correction["file"] for correction in prompts["corrected"]],
    }


def check_mergeable(config: Mapping[str, Any], base: Path) -> None:
    """Raise UsageError when this run's result cannot be merged, saying what to do instead."""
    tuning = config.get("finetuning_type", "lora")
    if tuning != "lora":
        raise UsageError(
            f"finetuning_type {tuning} trains the model's own weights: there is no adapter to "
            f"merge, {config['output_dir']} is the whole model already"
        )
    for key in ("resize_vocab", "add_tokens", "add_special_tokens"):
        if config.get(key):
            raise UsageError(
                f"{key}: a merged model with a changed vocabulary cannot be compared with its "
                "base tensor by tensor: export it with llamafactory-cli and test it yourself"
            )
    if not (base / "config.json").is_file():
        raise UsageError(f"{base / 'config.json'}: missing: fetch the base model again")
    quantized = read_json(base / "config.json").get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unknown method")
        raise UsageError(
            f"{base}: base model is quantized ({method}); adapters merge only into full weights: "
            "give the unquantized model as model_name_or_path"
        )


def check_base(base: Path, model: Mapping[str, Any]) -> None:
    """Raise UsageError unless the base is whole and the one the adapter was trained on.

    `model` is run.json's record of it: size and sha256 of every file, so a base that was
    exchanged since then is found here even when all shapes agree.
    """
    expected = {
        name: FileRecord(int(record["size"]), str(record["sha256"]))
        for name, record in model.get("files", {}).items()
    }
    require(base, model.get("name"), expected, hashes=True)


def parameter_count(folder: Path) -> int:
    """Return how many numbers the tensors of a model folder hold."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(folder).values())


def export_keys(asked: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return LLaMA-Factory's export keys: what was asked, with dtype and device made certain.

    infer_dtype `auto` becomes the dtype of the base's weights: 0.9.3 writes float32, twice the
    size, for `auto` on a machine without a GPU.
    """
    keys = {key: value for key, value in asked.items() if key not in _OURS}
    if keys.get("export_legacy_format"):
        raise UsageError(
            "export_legacy_format: true writes pickles, which no proof reads: set false"
        )
    if keys.get("export_hub_model_id"):
        raise UsageError(
            "export_hub_model_id: uploads before the proof: upload RUN/merged after it"
        )
    keys.setdefault("export_size", 5)
    keys.setdefault("export_device", "cpu")
    dtype = keys.setdefault("infer_dtype", "bfloat16")
    if dtype == "auto":
        stored, _ = max(tensor_shapes(base).values(), key=lambda found: math.prod(found[1]))
        names = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
        keys["infer_dtype"] = names.get(stored, "bfloat16")
    elif dtype not in SIZES:
        raise UsageError(f"infer_dtype: {dtype!r}, one of {', '.join(SIZES)} or auto expected")
    return keys


def check_room(folder: Path, *, disk: int, memory: int) -> None:
    """Raise JobError unless `disk` bytes are free at `folder`, and `memory` bytes of RAM."""
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise JobError(
            "disk_full",
            f"{folder}: the merged model needs {human_bytes(disk)}, {human_bytes(free)} are free: "
            "free space on that disk",
        )
    have = resources.memory_available()
    if have < memory:
        raise JobError(
            "host_oom",
            f"needs {human_bytes(memory)} of memory, {human_bytes(have)} are available: close "
            "other programs, or merge on a machine with more",
        )


def check_complete(folder: Path, base: Path, facts: AdapterFacts, dtype: str) -> None:
    """Raise TunesmithError unless the export is a whole model, of `dtype`, and not the base."""
    problems = verify(folder)
    if problems:
        raise TunesmithError(
            f"the export is not whole: {problems[0]}; see train.log",
            [str(problem) for problem in problems[1:]],
        )
    found = {stored for stored, _ in tensor_shapes(folder).values()}
    strange = found & {"F64", *SAFETENSORS_NAMES.values()} - {SAFETENSORS_NAMES[dtype]}
    if strange:
        raise TunesmithError(f"{folder}: holds {', '.join(sorted(strange))}, {dtype} asked for")
    if not _changed(folder, base, facts):
        # LLaMA-Factory issue 9051: an export that wrote the original weights back.
        raise TunesmithError(
            f"the export equals the base model in all {len(facts.targets)} target tensors: the "
            "adapter has no effect or was not applied; look at its lora_B weights"
        )


def _changed(merged: Path, base: Path, facts: AdapterFacts) -> bool:
    """Return whether any target tensor differs from the base's; stops at the first."""
    new, old = stored_below(merged), stored_below(base)
    # A renamed tensor is the proof's to judge.
    names = sorted(set(facts.targets.values()) & new.keys())
    return any(stream.differs(old[name], new[name]) for name in names)


def _export(
    config: Mapping[str, Any], keys: Mapping[str, Any], adapters: list[str], part: Path
) -> None:
    from llamafactory.train.tuner import export_model

    args = inference.arguments(config, adapters=adapters)
    # A QLoRA run's adapter goes into the full base weights, never into quantized ones.
    for key in [key for key in args if key.startswith(("quantization_", "double_quantization"))]:
        del args[key]
    export_model({**args, **keys, "export_dir": str(part), "export_legacy_format": False})


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, merged: Path) -> None:
    """Sync `part` to disk and give it the name `merged`; a proof of an older one goes."""
    mode = (part / "config.json").stat().st_mode
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors writes 0600: whoever may read the rest may read this
            _fsync(file)
    fsync_folder(part)
    (merged.parent / "proof.json").unlink(missing_ok=True)
    disown_merged(merged.parent)
    old = merged.parent / _OLD
    shutil.rmtree(old, ignore_errors=True)
    if merged.exists():
        merged.rename(old)
    part.rename(merged)
    fsync_folder(merged.parent)
    shutil.rmtree(old, ignore_errors=True)
