"""Adapter + base model -> merged model, by LLaMA-Factory's own export, whole or not at all.

LLaMA-Factory 0.9.3's export (train/tuner.py, export_model) writes into the folder it is
given and only logs a warning when the tokenizer could not be saved; so it writes into a
folder of ours, which gets its name RUN/merged after everything in it was checked. Prompt parity
is part of that: a model served with another prompt than it was trained with is not the model.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import fsync_folder, human_bytes, read_json, sha256_of, write_json
from tunesmith.job import inference, manifest, parity, resources
from tunesmith.job.adapter import ADAPTER_WEIGHTS, AdapterFacts, check_fits
from tunesmith.job.failures import JobError
from tunesmith.job.weights import Reader
from tunesmith.modelfiles import FileRecord, require, tensor_shapes, verify

MERGED = "merged"
REFUSED = "merged.refused"
_PART = ".merged.part"
_OLD = ".merged.old"

# Bytes an element of each dtype, and its name in safetensors and in PyTorch.
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ACCEPT = "accept_mismatch"  # of request["merge"]: export although prompts differ
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
    check_base(base, request.get("model", {}))
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
    size = parameter_count(base) * SIZES[keys["infer_dtype"]]
    check_room(run_dir, disk=int(1.2 * size), memory=int(1.2 * size) + 1_000_000_000)
    part = run_dir / _PART
    shutil.rmtree(part, ignore_errors=True)
    try:
        _export(config, keys, adapters, part)
        step(2)
        check_complete(part, base, facts, keys["infer_dtype"])
        step(3)
        prompts = _align(run_dir, request, config, part)
        for correction in prompts["corrected"]:
            why = "so that the prompt is the trained one"
            emit("changed", what=correction["file"], to="ours", why=why, **{"from": "exported"})
        step(4)
        made_of = _made_of(run_dir, request, adapters, facts, keys, prompts)
        manifest.write(part, made_of)
        _put_in_place(part, run_dir / MERGED)
    finally:
        shutil.rmtree(part, ignore_errors=True)
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
        "seconds": round(time.monotonic() - started, 1),
    }


def _align(
    run_dir: Path, request: Mapping[str, Any], config: Mapping[str, Any], part: Path
) -> dict[str, Any]:
    """Correct the export's prompts, write RUN/parity.json, and stop here if one still differs."""
    codec = inference.codec(inference.arguments(config))
    found = parity.align(config, codec, part)
    accepted = bool(request.get("merge", {}).get(ACCEPT))
    found["accepted"] = accepted and not found["passed"]
    write_json(run_dir / "parity.json", found)
    if not found["passed"] and not accepted:
        faults = parity.faults_of(found)
        raise TunesmithError(
            f"the merged model would not be asked as it was trained: {faults[0]}; "
            f"{parity.advice(config, found)}, or export it all the same: "
            f"`inv merge --run {run_dir.name} --accept-mismatch`",
            faults[1:],
        )
    return found


def _made_of(
    run_dir: Path,
    request: Mapping[str, Any],
    adapters: list[str],
    facts: AdapterFacts,
    keys: Mapping[str, Any],
    prompts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the manifest says of the model's origin; no path of this machine."""
    model = request.get("model", {})
    return {
        "run": run_dir.name,
        "base": {key: model.get(key) for key in ("name", "revision", "files")},
        "adapters": [
            {"sha256": sha256_of(Path(folder) / ADAPTER_WEIGHTS), "name": Path(folder).name}
            for folder in adapters
        ],
        "lora": {"rank": facts.rank, "alpha": facts.alpha, "scale": facts.scale},
        "dtype": keys["infer_dtype"],
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


def memory_available() -> int:
    """Return the bytes this process can still take: of the machine, and of its cgroup."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    total = int(meminfo["MemTotal"].split()[0]) * 1024
    limit = resources.memory_limit()
    if limit < total:
        used = [
            _cgroup_use(file)
            for file in resources.cgroup_files("memory", "memory.usage_in_bytes", "memory.current")
        ]
        available = min(available, limit - min(used, default=0))
    return available


def _cgroup_use(file: Path) -> int:
    """Return a cgroup's use without the file cache the kernel gives back on demand."""
    statistics = dict(
        line.split(" ", 1) for line in (file.parent / "memory.stat").read_text().splitlines()
    )
    cache = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return max(0, int(file.read_text()) - int(cache))


def check_room(folder: Path, *, disk: int, memory: int) -> None:
    """Raise JobError unless `disk` bytes are free at `folder`, and `memory` bytes of RAM."""
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise JobError(
            "disk_full",
            f"{folder}: the merged model needs {human_bytes(disk)}, {human_bytes(free)} are free: "
            "free space on that disk",
        )
    have = memory_available()
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
            f"LLaMA-Factory's export is not whole: {problems[0]}; see train.log",
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
    with Reader(merged) as new, Reader(base) as old:
        # A renamed tensor is the proof's to judge.
        for name in sorted(set(facts.targets.values()) & tensor_shapes(merged).keys()):
            tensor = new.get(name)
            if bool((tensor != old.get(name).to(tensor.dtype)).any()):
                return True
    return False


def _export(
    config: Mapping[str, Any], keys: Mapping[str, Any], adapters: list[str], part: Path
) -> None:
    from llamafactory.train.tuner import export_model

    args = inference.arguments(config, adapters=adapters)
    # A QLoRA run's adapter goes into the full base weights, never into quantized ones.
    for key in [key for key in args if key.startswith(("quantization_", "double_quantization"))]:
        del args[key]
    export_model({**args, **keys, "export_dir": str(part), "export_legacy_format": False})


def _put_in_place(part: Path, merged: Path) -> None:
    """Sync `part` to disk and give it the name `merged`; a proof of an older one goes."""
    mode = (part / "config.json").stat().st_mode
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors writes 0600: whoever may read the rest may read this
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    fsync_folder(part)
    (merged.parent / "proof.json").unlink(missing_ok=True)
    old = merged.parent / _OLD
    shutil.rmtree(old, ignore_errors=True)
    if merged.exists():
        merged.rename(old)
    part.rename(merged)
    fsync_folder(merged.parent)
    shutil.rmtree(old, ignore_errors=True)
