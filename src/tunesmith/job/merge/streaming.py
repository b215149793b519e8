"""Adapter + base model -> the weights files of the merged model, one block of rows at a time.

W' = round(W + (B @ A) * scale): product, scaling and sum in float32, one rounding to the merged
dtype. These are the operations of PEFT 0.15.2 in their order (tuners/lora/layer.py,
get_delta_weight and merge: an adapter in float32 gives a float32 delta, and `weight += delta`
rounds once), so with PyTorch's products (job/merge/matmul.py) every file has the bytes that
LLaMA-Factory's export writes. Everything the adapter does not touch is copied inside the kernel.

Memory is a few blocks per process, whatever the model's size. Needs NumPy, but not PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.documents import Config
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import read_json, sha256_of
from tunesmith.job.merge.adapter import ADAPTER_WEIGHTS, AdapterFacts
from tunesmith.job.merge.blocks import (
    WORDS,
    NotANumber,
    Scratch,
    Sources,
    get,
    narrow,
    put,
    read,
    widen,
)
from tunesmith.job.merge.hashing import StreamingHash
from tunesmith.job.merge.matmul import Array, Products
from tunesmith.job.merge.pool import WorkerPool
from tunesmith.job.merge.tensors import Stored, Tensor, beginning, stored, stored_below, writable

FLOATS = ("BF16", "F16", "F32")
WEIGHTS = "model.safetensors"
# Bytes of all processes, whatever the model: 175 MB were measured with PyTorch's product and two
# processes; each further one takes 10 MB.
MEMORY = 300_000_000

# Elements of a block: 3 MB with product and sum. The best of 2^15 to 2^18 in measurements.
_BLOCK = 1 << 18
# Blocks, or bytes of a copy, per task: a few hundredths of a second.
_BLOCKS = 16
_COPIED = 1 << 24
# A product with one row is summed in a different order (a dot product) than a row among others.
_LEAST_ROWS = 16
_NOT_IN_KERNEL = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_ROTARY = "rotary_emb.inv_freq"  # a buffer old checkpoints carry, computed at load today


class UnsupportedMerge(Exception):
    """This merge is not the plain sum that this module computes; the text gives the reason."""


@dataclass(frozen=True)
class Shard:
    """A file to write and its tensors."""

    file: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class MergeOutcome:
    """The result of a merge."""

    bytes: int  # of all files
    copied: int  # of these, bytes copied from the base
    changed: frozenset[str]  # target tensors that differ from the base in at least one bit
    # sha256 of the files in `beside`, and of the written files if `hashed`.
    hashes: Mapping[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Range:
    """A range of a file to write: a copy, or the tensor `name` plus the adapter's delta."""

    out: int  # descriptor
    at: int  # offset in the file, bytes
    source: Stored
    size: int  # bytes of the source
    dtype: str  # dtype to write, safetensors' name
    name: str | None = None  # None: a copy of bytes
    pair: tuple[Stored, Stored] | None = None  # lora_A [rank, in], lora_B [out, rank], float32


@dataclass(frozen=True)
class _Task:
    """A part of a range, for one worker."""

    of: _Range
    # (first, last), last exclusive: bytes of a copy, or rows of a tensor, one pair per block.
    parts: tuple[tuple[int, int], ...]
    end: int  # offset of its end in bytes, over all files in order


def why_not(
    facts: AdapterFacts,
    adapters: Sequence[str],
    keys: Config,
    config: Config,
    base: Path,
) -> str | None:
    """Return why a merge is not the plain sum of this module, None if it is."""
    if facts.beyond_plain:
        return ", ".join(facts.beyond_plain)
    if len(adapters) > 1:
        return "several adapters, each rounded in turn"
    if keys["export_device"] != "cpu":
        return f"export_device: {keys['export_device']} multiplies elsewhere"
    if config.get("mixture_of_depths"):
        return "mixture_of_depths changes the model"
    if "auto_map" in read_json(base / "config.json"):
        return "the model has its own code"
    tensors = stored_below(base)
    if not tensors:
        return "the base model has no safetensors"
    for name in facts.targets.values():
        if tensors[name].dtype not in FLOATS:
            return f"{name} is {tensors[name].dtype}"
    adapter = stored(facts.folder / ADAPTER_WEIGHTS)
    names = {name for module in facts.targets for name in pair_of(module)}
    if strange := sorted(adapter.keys() - names):
        return f"the adapter also contains {strange[0]}"
    other = next((name for name in sorted(names) if adapter[name].dtype != "F32"), None)
    return f"{other} is {adapter[other].dtype}, not F32" if other else None


def pair_of(module: str) -> tuple[str, str]:
    """Return the names of a module's lora_A and lora_B in the adapter's file."""
    lora = f"base_model.model.{module}.lora_"
    return f"{lora}A.weight", f"{lora}B.weight"


def predicted_files(base: Path, dtype: str, export_size: float) -> list[Shard] | None:
    """Return the single file that an export of `base` should produce, None if it is split.

    The order of tensors matters only for several files, and then the model defines it.
    `export_size` is in GB (10^9 bytes).
    """
    tensors = {
        name: converted(tensor, dtype)
        for name, tensor in stored_below(base).items()
        if not name.endswith(_ROTARY)
    }
    if read_json(base / "config.json").get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    total = sum(tensor.size for tensor in tensors.values())
    return [Shard(WEIGHTS, tensors)] if total <= export_size * 10**9 else None


def converted(tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor's description in a model of `dtype` (safetensors' name); floats change."""
    return Tensor(dtype if tensor.dtype in FLOATS else tensor.dtype, tensor.shape)


def merge(
    base: Path,
    facts: AdapterFacts,
    shards: Sequence[Shard],
    folder: Path,
    products: Products,
    workers: int = 1,
    beside: Sequence[Path] = (),
    *,
    hashed: bool = False,
) -> MergeOutcome:
    """Write `shards` into `folder`: the base's tensors, with B @ A * scale added to each target.

    `workers` processes write, and hash the files in `beside`; with `hashed`, the written files are
    hashed too, while they grow. Raises UnsupportedMerge if a tensor to write is not in the base or
    a sum is NaN; TunesmithError if part of the adapter is not used. The files are complete but not
    yet synced.
    """
    tensors = stored_below(base)
    adapter = stored(facts.folder / ADAPTER_WEIGHTS)
    modules = {tensor: module for module, tensor in facts.targets.items()}
    pairs = {
        name: (adapter[a], adapter[b])
        for name, module in modules.items()
        for a, b in [pair_of(module)]
    }
    _check_supported(tensors, shards)
    planned = {name for shard in shards for name in shard.tensors}
    if unused := sorted(pairs.keys() - planned):
        raise TunesmithError(
            f"{facts.folder}: the adapter changes {unused[0]}, which the merged model does not "
            "have: check target_modules in adapter_config.json"
        )
    scratch = Scratch()
    with contextlib.ExitStack() as stack:
        sources = Sources(stack)
        tasks: list[_Task] = []
        files: list[tuple[Path, int, int]] = []
        total = 0
        for shard in shards:
            out = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            stack.callback(os.close, out)
            head, starts = beginning(shard.tensors)
            size = len(head) + sum(tensor.size for tensor in shard.tensors.values())
            os.ftruncate(out, size)
            put(out, memoryview(head), 0)
            files.append((folder / shard.file, out, size))
            for part in _ranges(out, shard, starts, tensors, pairs):
                tasks += _tasks(part, total)
            total += size

        def do(number: int) -> Any:
            if number < len(beside):
                return sha256_of(beside[number])
            task = tasks[number - len(beside)]
            if task.of.name is not None:
                return _fill(task, sources, scratch, products, facts.scale)
            for first, last in task.parts:
                start, at = task.of.source.start + first, task.of.at + first
                _copy(sources.of(task.of.source.file), start, task.of.out, at, last - first)
            return None

        hashes: dict[Path, str] = {}
        changed: set[str] = set()
        pool = stack.enter_context(WorkerPool(do, workers))
        with StreamingHash(files if hashed else [], [task.end for task in tasks]) as hashing:
            for number, value in pool.each(len(beside) + len(tasks)):
                if number < len(beside):
                    hashes[beside[number]] = value
                    continue
                if value:
                    changed.add(str(tasks[number - len(beside)].of.name))
                hashing.task_done(number - len(beside))
            hashes |= hashing.hashes()
    copied = sum(last - first for t in tasks if t.of.name is None for first, last in t.parts)
    return MergeOutcome(total, copied, frozenset(changed & pairs.keys()), hashes)


def differs(old: Stored, new: Stored) -> bool:
    """Return whether a merged tensor differs from the base's, cast; stop at the first bit."""
    import numpy as np

    scratch = Scratch()
    count = math.prod(old.shape)
    with contextlib.ExitStack() as stack:
        sources = Sources(stack)
        for first in range(0, count, _BLOCK):
            some = min(_BLOCK, count - first)
            was = read(sources, old, first, some, scratch, "was")
            now = read(sources, new, first, some, scratch, "now")
            if old.dtype != new.dtype:
                values = scratch.take("values", some, np.float32)
                widen(old.dtype, was, values)
                cast = scratch.take("cast", some, WORDS[new.dtype])
                try:
                    was = narrow(new.dtype, values, cast, scratch)
                except NotANumber:
                    continue  # PEFT's rounding of this one is unknown here
            if was.tobytes() != now.tobytes():
                return True
    return False


def _check_supported(base: Mapping[str, Stored], shards: Sequence[Shard]) -> None:
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name not in base:
                raise UnsupportedMerge(f"{name} is not in the base model's files")
            if not writable(tensor.dtype):
                raise UnsupportedMerge(f"{name} is {tensor.dtype}")
            if base[name].shape != tensor.shape:
                raise UnsupportedMerge(
                    f"{name} is {list(base[name].shape)} in the base model's files"
                )
            if base[name].dtype != tensor.dtype and base[name].dtype not in FLOATS:
                raise UnsupportedMerge(f"{name} is {base[name].dtype} in the base model's files")


def _ranges(
    out: int,
    shard: Shard,
    starts: Mapping[str, int],
    base: Mapping[str, Stored],
    pairs: Mapping[str, tuple[Stored, Stored]],
) -> list[_Range]:
    """Return the ranges to write to a file; adjacent copies become one range."""
    ranges: list[_Range] = []
    for name in sorted(starts, key=starts.__getitem__):
        source, tensor, at = base[name], shard.tensors[name], starts[name]
        if name in pairs or source.dtype != tensor.dtype:
            ranges.append(_Range(out, at, source, source.size, tensor.dtype, name, pairs.get(name)))
            continue
        last = ranges[-1] if ranges else None
        if (
            last
            and last.name is None
            and last.source.file == source.file
            and last.source.start + last.size == source.start
            and last.at + last.size == at
        ):
            ranges[-1] = _Range(out, last.at, last.source, last.size + source.size, last.dtype)
        else:
            ranges.append(_Range(out, at, source, source.size, tensor.dtype))
    return ranges


def _tasks(of: _Range, before: int) -> Iterator[_Task]:
    """Split a range into tasks of similar duration; `before`: bytes of the preceding files."""
    if of.name is None:
        for first in range(0, of.size, _COPIED):
            last = min(of.size, first + _COPIED)
            yield _Task(of, ((first, last),), before + of.at + last)
        return
    rows, columns, width = _sides(of)
    parts = list(_parts(rows, columns))
    for some in range(0, len(parts), _BLOCKS):
        these = tuple(parts[some : some + _BLOCKS])
        yield _Task(of, these, before + of.at + these[-1][1] * columns * width)


def _sides(of: _Range) -> tuple[int, int, int]:
    """Return (rows, columns) of a tensor seen as a matrix, and bytes per written element.

    Columns are the last dimension; a vector is one row, a scalar one row of one column.
    """
    columns = of.source.shape[-1] if of.source.shape else 1
    rows = math.prod(of.source.shape) // columns if columns else 0
    return rows, columns, Tensor(of.dtype, (1,)).size


def _copy(source: int, start: int, out: int, at: int, size: int) -> None:
    """Copy a range of bytes, in the kernel if the file systems can."""
    in_kernel = hasattr(os, "copy_file_range")
    done = 0
    while done < size:
        if in_kernel:
            try:
                count = os.copy_file_range(source, out, size - done, start + done, at + done)
            except OSError as error:
                if error.errno not in _NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source, min(size - done, 1 << 20), start + done)
            count = put(out, memoryview(data), at + done)
        if not count:
            raise TunesmithError("a file became shorter while it was copied: merge again")
        done += count


def _fill(
    task: _Task, sources: Sources, scratch: Scratch, products: Products, scale: float
) -> bool:
    """Write the rows of a task: W + scale * B @ A, computed in float32, or W in another dtype.

    Returns whether the written rows differ from the base's in any bit.
    """
    try:
        return _filled(task, sources, scratch, products, scale)
    except NotANumber:
        raise UnsupportedMerge("a weight is NaN") from None


def _filled(
    task: _Task, sources: Sources, scratch: Scratch, products: Products, scale: float
) -> bool:
    import numpy as np

    of, source, convert = task.of, task.of.source, products.convert
    _, columns, width = _sides(of)
    start, end = task.parts[0][0], task.parts[-1][1]
    if of.pair:
        a, b = _rows(sources, of.pair[0]), _rows(sources, of.pair[1], start, end)
    changed = False
    for first, last in task.parts:
        count = (last - first) * columns
        new = read(sources, source, first * columns, count, scratch, "in")
        values = scratch.take("values", count, np.float32)
        widen(source.dtype, new, values, convert)
        if source.dtype != of.dtype:
            # The export loads the base in the merged dtype, so it is rounded before the addition.
            cast = scratch.take("cast", count, WORDS[of.dtype])
            new = narrow(of.dtype, values, cast, scratch, convert)
            widen(of.dtype, new, values, convert)
        if of.pair:
            was = new
            delta = scratch.take("delta", count, np.float32)
            products.multiply(
                b[first - start : last - start], a, delta.reshape(last - first, columns)
            )
            if scale != 1.0:
                delta *= np.float32(scale)
            delta += values
            rounded = scratch.take("out", count, WORDS[of.dtype])
            new = narrow(of.dtype, delta, rounded, scratch, convert)
            changed = changed or not np.array_equal(was, new)
        put(of.out, memoryview(new).cast("B"), of.at + first * columns * width)
    return changed


def _parts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of similar blocks that cover `rows`; none is a single leftover row."""
    blocks = -(-rows // max(_LEAST_ROWS, _BLOCK // max(1, columns)))
    for number in range(blocks):
        yield number * rows // blocks, (number + 1) * rows // blocks


def _rows(sources: Sources, tensor: Stored, first: int = 0, last: int | None = None) -> Array:
    """Return rows `first` to `last` (exclusive) of an adapter matrix: [rows, columns], float32."""
    import numpy as np

    rows, columns = tensor.shape
    matrix = np.empty(((rows if last is None else last) - first, columns), np.float32)
    get(sources.of(tensor.file), matrix.reshape(-1), tensor.start + first * columns * 4)
    return matrix
