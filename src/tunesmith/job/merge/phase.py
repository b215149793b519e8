"""Adapter + base model -> merged model: the bytes of LLaMA-Factory's export, complete or nothing.

Plain LoRA is merged block by block (job/merge/streaming.py) while LLaMA-Factory, in another
process, writes all files but the weights (job/merge/skeleton.py). Other adapters go through
LLaMA-Factory's export with the whole model in memory, and an event says so.

LLaMA-Factory 0.9.3's export (train/tuner.py, export_model) writes directly into the given folder
and only logs a warning if the tokenizer cannot be saved. So everything is written to a temporary
folder, which is renamed to RUN/merged after all checks. Prompt parity is one of them: a model that
gets a different prompt than in training behaves differently.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.basemodel.files import FileRecord, Problem, damaged, require, tensor_shapes, verify
from tunesmith.core import formats
from tunesmith.core.disk import free_bytes, shortage
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_file, fsync_folder, sha256_of, write_json
from tunesmith.core.swap import put_in_place
from tunesmith.job.inference import engine
from tunesmith.job.merge import bundle, inputs, manifest, matmul, pool, skeleton, streaming
from tunesmith.job.merge.adapter import ADAPTER_WEIGHTS, AdapterFacts
from tunesmith.job.merge.inputs import (
    ACCEPT,
    SAFETENSORS_NAMES,
    SIZES,
    MergeInputs,
    requires_full_merge,
)
from tunesmith.job.merge.tensors import stored_below
from tunesmith.job.prompts import parity
from tunesmith.job.prompts.records import ParityRecord
from tunesmith.job.run import seals
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.folder import MERGED
from tunesmith.job.run.manifest import disown_merged
from tunesmith.job.run.schema import ModelRef, RunRequest
from tunesmith.job.system import resources

_PART = ".merged.part"

# The library that computed the sums if the whole model was in memory.
PEFT = "peft"
_BY_BLOCKS = {"from": "block by block"}


def run(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> dict[str, Any]:
    """Merge RUN/output into its base model as RUN/merged; return its folder, size and figures.

    `merge` of run.json contains LLaMA-Factory's export keys. Raises UsageError if the run cannot
    be merged (full or freeze tuning, quantised or damaged base, adapter of another base), JobError
    if memory or disk do not suffice, TunesmithError if the export is incomplete, or if a path to
    the model produces a different prompt than the training (RUN/parity.json says which) and
    accept_mismatch is not true. An earlier merged model stays until the new one is complete.
    """
    started = time.monotonic()

    def step(done: int) -> None:
        emit("progress", phase="merge", done=done, total=5, unit="steps")

    step(0)
    merge = inputs.read(run_dir, request)
    facts, keys = merge.facts, merge.keys
    step(1)
    if keys["infer_dtype"] != (request.merge or {}).get("infer_dtype", keys["infer_dtype"]):
        emit(
            "changed",
            what="infer_dtype",
            to=keys["infer_dtype"],
            why="auto writes float32 on a machine without a GPU",
            **{"from": "auto"},
        )
    task = _Task(run_dir, run_dir / _PART, request, merge, step)
    _clear(task.part)
    try:
        result = _merge(task, emit)
        check_complete(task.part, merge.base, facts, keys["infer_dtype"])
        step(3)
        prompts = _checked_prompts(task, result.prompts)
        for correction in prompts["corrected"]:
            why = "to match the training prompt"
            emit("changed", what=correction["file"], to="replaced", why=why, **{"from": "exported"})
        step(4)
        origin = _origin(task, prompts, result.arithmetic)
        files = manifest.write(task.part, origin, result.hashes)
        seals.forget(run_dir, (MERGED, "proof.json"))
        _put_in_place(task.part, run_dir / MERGED)
        hashes = {f"{MERGED}/{name}": asdict(record) for name, record in files.items()}
        seals.seal(run_dir, "merge", (MERGED,), hashes)
    finally:
        shutil.rmtree(task.part, ignore_errors=True)
    step(5)
    return {
        "folder": str(run_dir / MERGED),
        "bytes": sum(file.stat().st_size for file in (run_dir / MERGED).iterdir()),
        "dtype": keys["infer_dtype"],
        "base": str(merge.base),
        "rank": facts.rank,
        "alpha": facts.alpha,
        "scale": facts.scale,
        "targets": len(facts.targets),
        "parity": prompts["passed"],
        "corrected": [correction["file"] for correction in prompts["corrected"]],
        "arithmetic": result.arithmetic,
        "seconds": round(time.monotonic() - started, 1),
    }


@dataclass(frozen=True)
class _Task:
    """The inputs of one merge."""

    run_dir: Path
    part: Path
    request: RunRequest
    merge: MergeInputs
    step: Callable[[int], None]

    @property
    def model(self) -> ModelRef:
        """run.json's record of the base model."""
        return self.request.model or ModelRef()


@dataclass(frozen=True)
class _Merged:
    """The result of a merge: prompt comparison, arithmetic library, computed sha256 of files."""

    prompts: ParityRecord
    arithmetic: str
    hashes: Mapping[str, str] = field(default_factory=dict)


def _merge(task: _Task, emit: Callable[..., None]) -> _Merged:
    """Merge into task.part, block by block if that is possible; check the base."""
    merge = task.merge
    size = parameter_count(merge.base) * SIZES[merge.keys["infer_dtype"]]
    disk = int(1.2 * size)
    reason = merge.why_whole()
    if reason is None:
        check_room(task.run_dir, disk=disk, memory=_memory(task))
        try:
            return _stream(task)
        except streaming.UnsupportedMerge as other:
            reason = str(other)
            _clear(task.part)
        except Exception:
            check_base(merge.base, task.model)  # a damaged base would explain the error
            raise
    if not skeleton.possible():
        raise requires_full_merge(task.run_dir, reason)
    emit("changed", what="merge", to="whole model in memory, by PEFT", why=reason, **_BY_BLOCKS)
    check_room(task.run_dir, disk=disk, memory=int(1.2 * size) + 1_000_000_000)
    skeleton.record_versions(task.run_dir)
    # Hash in parallel with the merge, which reads the same bytes; both must succeed.
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(check_base, merge.base, task.model)
        try:
            _export(merge, task.part)
        finally:
            verified.result()
    task.step(2)
    codec = engine.codec(engine.arguments(merge.config))
    return _Merged(parity.align(merge.config, codec, task.part), PEFT)


def _stream(task: _Task) -> _Merged:
    """Write the weights; the other files come from the run's bundle or from another process."""
    merge, part = task.merge, task.part
    base, facts = merge.base, merge.facts
    dtype = SAFETENSORS_NAMES[merge.keys["infer_dtype"]]
    products, workers = matmul.best(), pool.fitting()
    recorded = check_sizes(base, task.model)
    with _skeleton(task) as other:
        shards = (
            streaming.predicted_files(base, dtype, float(merge.keys["export_size"]))
            or other.files()
        )
        beside = [base / name for name in recorded]
        outcome = streaming.merge(base, facts, shards, part, products, workers, beside, hashed=True)
        check_hashes(base, task.model, {path.name: outcome.hashes[path] for path in beside})
        if shards != other.files():
            for shard in shards:
                (part / shard.file).unlink()
            outcome = streaming.merge(
                base, facts, other.files(), part, products, workers, hashed=True
            )
        task.step(2)
        prompts = other.prompts()
    hashes = {shard.file: outcome.hashes[part / shard.file] for shard in other.files()}
    return _Merged(prompts, products.name, hashes)


@contextlib.contextmanager
def _skeleton(task: _Task) -> Iterator[skeleton.ExportSkeleton | bundle.MergeBundle]:
    """Yield the source of all files but the weights: the run's bundle, or LLaMA-Factory."""
    merge = task.merge
    found = bundle.find(task.run_dir, task.part, task.request, merge)
    if found:
        yield found
        return
    if not skeleton.possible():
        raise UsageError(
            f"{task.run_dir / bundle.FOLDER}: no bundle for this merge, and LLaMA-Factory is not "
            "installed here: `inv pull --merge-here` downloads the bundle from the host, "
            "`inv stack.install` installs LLaMA-Factory"
        )
    with skeleton.begin(task.run_dir, task.part, merge.config, merge.keys) as other:
        yield other


def _memory(task: _Task) -> int:
    """Return the bytes of memory of a block-by-block merge, including LLaMA-Factory if it runs."""
    ready = bundle.find(task.run_dir, task.part, task.request, task.merge)
    return streaming.MEMORY if ready or not skeleton.possible() else skeleton.MEMORY


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _checked_prompts(task: _Task, prompts: ParityRecord) -> ParityRecord:
    """Write RUN/parity.json; raise TunesmithError if a prompt still differs and is not accepted."""
    accepted = bool((task.request.merge or {}).get(ACCEPT))
    prompts["accepted"] = accepted and not prompts["passed"]
    with seals.rewriting(task.run_dir, "merge", "parity.json"):
        write_json(task.run_dir / "parity.json", prompts)
    if not prompts["passed"] and not accepted:
        faults = parity.faults_of(prompts)
        raise TunesmithError(
            f"the merged model would get a different prompt than in training: {faults[0]}; "
            f"{parity.advice(task.merge.config, prompts)}, or merge it anyway: "
            f"`inv merge --run {task.run_dir.name} --accept-mismatch`",
            faults[1:],
        )
    return prompts


def _origin(task: _Task, prompts: ParityRecord, arithmetic: str) -> manifest.Origin:
    model, merge = task.model, task.merge
    facts = merge.facts
    return manifest.Origin(
        run=task.run_dir.name,
        base=manifest.BaseOrigin(model.name, model.revision, _recorded(model)),
        adapters=tuple(
            manifest.AdapterOrigin(Path(folder).name, sha256_of(Path(folder) / ADAPTER_WEIGHTS))
            for folder in merge.adapters
        ),
        lora=manifest.LoraOrigin(facts.rank, facts.alpha, facts.scale),
        dtype=merge.keys["infer_dtype"],
        arithmetic=arithmetic,
        parity=prompts["passed"],
        corrected=tuple(correction["file"] for correction in prompts["corrected"]),
    )


def check_base(base: Path, model: ModelRef) -> None:
    """Raise UsageError unless the base is complete and the one the adapter was trained on.

    `model` is its record in run.json: size and sha256 of every file, so a base that was replaced
    since then is detected even if all shapes agree.
    """
    recorded = check_sizes(base, model)
    check_hashes(base, model, {name: sha256_of(base / name) for name in recorded})


def check_sizes(base: Path, model: ModelRef) -> list[str]:
    """Return the recorded files of the base. Raises UsageError unless all exist in full size."""
    require(base, model.name, _recorded(model))
    return list(_recorded(model))


def check_hashes(base: Path, model: ModelRef, hashes: Mapping[str, str]) -> None:
    """Raise UsageError unless `hashes`, the sha256 of the base's files, match the record."""
    problems = tuple(
        Problem(name, f"expected sha256 {record.sha256}, found {hashes[name]}")
        for name, record in _recorded(model).items()
        if hashes[name] != record.sha256
    )
    if problems:
        raise damaged(base, problems, model.name)


def _recorded(model: ModelRef) -> dict[str, FileRecord]:
    return {name: FileRecord(r.size, r.sha256) for name, r in model.files.items()}


def parameter_count(folder: Path) -> int:
    """Return the number of parameters in a model folder."""
    return sum(math.prod(shape) for _, shape in tensor_shapes(folder).values())


def check_room(folder: Path, *, disk: int, memory: int) -> None:
    """Raise JobError unless `disk` bytes are free at `folder`, and `memory` bytes of RAM."""
    if (text := shortage(folder, free_bytes(folder), disk, "the merged model")) is not None:
        raise JobError("disk_full", f"{text}; free space there")
    free = resources.memory_available()
    if free < memory:
        raise JobError(
            "host_oom",
            f"needs {formats.size(memory)} of memory, {formats.size(free)} are available: close "
            "other programs, or merge on a machine with more",
        )


def check_complete(folder: Path, base: Path, facts: AdapterFacts, dtype: str) -> None:
    """Raise TunesmithError unless the export is a complete model of `dtype` and not the base."""
    problems = verify(folder)
    if problems:
        raise TunesmithError(
            f"the export is incomplete: {problems[0]}; see train.log",
            [str(problem) for problem in problems[1:]],
        )
    dtypes = {stored for stored, _ in tensor_shapes(folder).values()}
    strange = dtypes & {"F64", *SAFETENSORS_NAMES.values()} - {SAFETENSORS_NAMES[dtype]}
    if strange:
        raise TunesmithError(f"{folder}: holds {', '.join(sorted(strange))}, {dtype} expected")
    if not _changed(folder, base, facts):
        # LLaMA-Factory issue 9051: an export that wrote the original weights back.
        raise TunesmithError(
            f"the export equals the base model in all {len(facts.targets)} target tensors: the "
            "adapter has no effect or was not applied; check its lora_B weights"
        )


def _changed(merged: Path, base: Path, facts: AdapterFacts) -> bool:
    """Return whether any target tensor differs from the base's; stop at the first one."""
    new, old = stored_below(merged), stored_below(base)
    # Renamed tensors are left to the proof.
    names = sorted(set(facts.targets.values()) & new.keys())
    return any(streaming.differs(old[name], new[name]) for name in names)


def _export(merge: MergeInputs, part: Path) -> None:
    from llamafactory.train.tuner import export_model

    args = engine.arguments(merge.config, adapters=merge.adapters)
    # A QLoRA run's adapter is merged into the full base weights, never into quantized ones.
    for key in [key for key in args if key.startswith(("quantization_", "double_quantization"))]:
        del args[key]
    export_model({**args, **merge.keys, "export_dir": str(part), "export_legacy_format": False})


def _put_in_place(part: Path, merged: Path) -> None:
    """Sync `part` to disk and rename it to `merged`; delete the proof of an older one."""
    mode = (part / "config.json").stat().st_mode
    for file in part.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors writes 0600; use the mode of the other files
            fsync_file(file)
    fsync_folder(part)
    (merged.parent / "proof.json").unlink(missing_ok=True)
    disown_merged(merged.parent)
    put_in_place(part, merged)
