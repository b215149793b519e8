"""Adapter + base model -> the weights files of the merged model, one block of rows at a time.

W' = round(W + (B @ A) * scale): product, scaling and sum in float32, one rounding to the merged
dtype. These are the operations of PEFT 0.15.2 in their order (tuners/lora/layer.py,
get_delta_weight and merge: an adapter in float32 makes a float32 delta, and `weight += delta`
rounds once), so with products that are PyTorch's (job/products.py) every file has the bytes
LLaMA-Factory's export writes. What the adapter does not touch is copied inside the kernel.

Memory is a few blocks, whatever the model's size. Needs NumPy; not PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.files import read_json
from tunesmith.job.adapter import ADAPTER_WEIGHTS, AdapterFacts
from tunesmith.job.products import Products
from tunesmith.job.tensors import Stored, Tensor, beginning, known, stored, stored_below

FLOATS = ("BF16", "F16", "F32")
WEIGHTS = "model.safetensors"
# Bytes, whatever the model: measured 185 MB with PyTorch's product, 50 MB with NumPy's.
MEMORY = 300_000_000

# Numbers in a block. With its float32 product and sum it stays in a core's second cache.
_BLOCK = 1 << 17
# A product of one row is summed in another order (a dot product) than the same row of many.
_LEAST_ROWS = 16
_PIECE = 1 << 26  # bytes copied a call
_NOT_IN_KERNEL = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM}
_ROTARY = "rotary_emb.inv_freq"  # a buffer old checkpoints carry, computed at load today


class Uncovered(Exception):
    """What is asked is no plain sum of this module; the text says why."""


@dataclass(frozen=True)
class Shard:
    """A file to write and what it holds."""

    file: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What was written: bytes in all and bytes copied as they are, targets that differ."""

    bytes: int
    copied: int
    changed: frozenset[str]


@dataclass(frozen=True)
class _Task:
    """A range of a file to write: a copy, or `name` with what the adapter adds to it."""

    out: int  # descriptor
    at: int
    source: Stored
    size: int  # bytes of the source
    dtype: str
    name: str | None = None  # None: bytes as they are
    pair: tuple[Stored, Stored] | None = None  # lora_A, lora_B


@dataclass
class _Room(threading.local):
    """A worker's memory, kept from block to block: fresh pages cost more than the sums."""

    arrays: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, count: int, dtype: Any) -> Any:
        import numpy as np

        held = self.arrays.get(name)
        if held is None or held.size < count or held.dtype != dtype:
            held = self.arrays[name] = np.zeros(count, dtype)
        return held[:count]


def why_not(
    facts: AdapterFacts,
    adapters: Sequence[str],
    keys: Mapping[str, Any],
    config: Mapping[str, Any],
    base: Path,
) -> str | None:
    """Return what keeps a merge from being the plain sum of this module; None: nothing does."""
    if facts.beyond_plain:
        return ", ".join(facts.beyond_plain)
    if len(adapters) > 1:
        return "several adapters, each rounded in turn"
    if keys["export_device"] != "cpu":
        return f"export_device: {keys['export_device']} multiplies elsewhere"
    if config.get("mixture_of_depths"):
        return "mixture_of_depths changes the model"
    if "auto_map" in read_json(base / "config.json"):
        return "the model's code is its own"
    tensors = stored_below(base)
    if not tensors:
        return "the base model has no safetensors"
    for name in facts.targets.values():
        if tensors[name].dtype not in FLOATS:
            return f"{name} is {tensors[name].dtype}"
    adapter = stored(facts.folder / ADAPTER_WEIGHTS)
    names = {name for module in facts.targets for name in pair_of(module)}
    if strange := sorted(adapter.keys() - names):
        return f"the adapter holds {strange[0]} too"
    other = next((name for name in sorted(names) if adapter[name].dtype != "F32"), None)
    return f"{other} is {adapter[other].dtype}, not F32" if other else None


def pair_of(module: str) -> tuple[str, str]:
    """Return the names of a module's lora_A and lora_B in the adapter's file."""
    lora = f"base_model.model.{module}.lora_"
    return f"{lora}A.weight", f"{lora}B.weight"


def guessed(base: Path, dtype: str, export_size: float) -> list[Shard] | None:
    """Return the one file an export of `base` probably is; None where it must be asked for.

    Order counts only where there are several files, and then it is the model's own.
    `export_size` is in GB (10^9 bytes).
    """
    tensors = {
        name: converted(tensor, dtype)
        for name, tensor in stored_below(base).items()
        if not name.endswith(_ROTARY)
    }
    if read_json(base / "config.json").get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    whole = sum(tensor.size for tensor in tensors.values())
    return [Shard(WEIGHTS, tensors)] if whole <= export_size * 10**9 else None


def converted(tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor as a model of `dtype` (safetensors' word) has it: only floats change."""
    return Tensor(dtype if tensor.dtype in FLOATS else tensor.dtype, tensor.shape)


def merge(
    base: Path,
    facts: AdapterFacts,
    shards: Sequence[Shard],
    folder: Path,
    products: Products,
    workers: int = 2,
) -> Outcome:
    """Write `shards` into `folder`: the base's tensors, each target with its B @ A * scale.

    Raises Uncovered when a tensor to write is not the base's or a sum is not a number;
    TunesmithError when part of the adapter found no use. Files are complete, not yet synced.
    """
    tensors = stored_below(base)
    adapter = stored(facts.folder / ADAPTER_WEIGHTS)
    modules = {tensor: module for module, tensor in facts.targets.items()}
    pairs = {
        name: (adapter[a], adapter[b])
        for name, module in modules.items()
        for a, b in [pair_of(module)]
    }
    _check_known(tensors, shards)
    planned = {name for shard in shards for name in shard.tensors}
    if unused := sorted(pairs.keys() - planned):
        raise TunesmithError(
            f"{facts.folder}: the adapter changes {unused[0]}, which the merged model does not "
            "have: look at adapter_config.json, target_modules"
        )
    changed: set[str] = set()
    room = _Room()
    with contextlib.ExitStack() as stack:
        sources = _Sources(stack)
        tasks: list[_Task] = []
        total = 0
        for shard in shards:
            out = os.open(folder / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            stack.callback(os.close, out)
            head, starts = beginning(shard.tensors)
            size = len(head) + sum(tensor.size for tensor in shard.tensors.values())
            os.ftruncate(out, size)
            os.pwrite(out, head, 0)
            total += size
            tasks += _tasks(out, shard, starts, tensors, pairs)

        def do(task: _Task) -> int:
            if task.name is None:
                _copy(sources.of(task.source.file), task.source.start, task.out, task.at, task.size)
                return task.size
            if _fill(task, sources, room, products, facts.scale):
                changed.add(task.name)
            return 0

        copied = sum(_in_threads(do, tasks, workers))
    return Outcome(total, copied, frozenset(changed & pairs.keys()))


def differs(old: Stored, new: Stored) -> bool:
    """Return whether a merged tensor is not the base's in its own dtype; stops at the first bit."""
    import numpy as np

    room = _Room()
    count = math.prod(old.shape)
    with contextlib.ExitStack() as stack:
        sources = _Sources(stack)
        for first in range(0, count, _BLOCK):
            some = min(_BLOCK, count - first)
            was = _read(sources, old, first, some, room, "was")
            now = _read(sources, new, first, some, room, "now")
            if old.dtype != new.dtype:
                values = room.take("values", some, np.float32)
                _widen(old.dtype, was, values)
                was = _narrow(new.dtype, values, room.take("cast", some, _WORDS[new.dtype]), room)
            if was.tobytes() != now.tobytes():
                return True
    return False


def _read(sources: _Sources, tensor: Stored, first: int, count: int, room: _Room, name: str) -> Any:
    """Return `count` numbers of a tensor, from number `first` on, as they lie in the file."""
    raw = room.take(name, count, _WORDS[tensor.dtype])
    _get(sources.of(tensor.file), raw, tensor.start + first * Tensor(tensor.dtype, (1,)).size)
    return raw


def _in_threads(do: Callable[[_Task], int], tasks: Sequence[_Task], workers: int) -> list[int]:
    """Do all tasks; the first error ends those that have not begun."""
    with ThreadPoolExecutor(workers, thread_name_prefix="merge") as pool:
        futures = [pool.submit(do, task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_known(base: Mapping[str, Stored], shards: Sequence[Shard]) -> None:
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name not in base:
                raise Uncovered(f"{name} is not in the base model's files")
            if not known(tensor.dtype):
                raise Uncovered(f"{name} is {tensor.dtype}")
            if base[name].shape != tensor.shape:
                raise Uncovered(f"{name} is {list(base[name].shape)} in the base model's files")
            if base[name].dtype != tensor.dtype and base[name].dtype not in FLOATS:
                raise Uncovered(f"{name} is {base[name].dtype} in the base model's files")


def _tasks(
    out: int,
    shard: Shard,
    starts: Mapping[str, int],
    base: Mapping[str, Stored],
    pairs: Mapping[str, tuple[Stored, Stored]],
) -> list[_Task]:
    """Return what is to be done for a file; neighbours that are only copied are one task."""
    tasks: list[_Task] = []
    for name in sorted(starts, key=starts.__getitem__):
        source, tensor, at = base[name], shard.tensors[name], starts[name]
        if name in pairs or source.dtype != tensor.dtype:
            tasks.append(_Task(out, at, source, source.size, tensor.dtype, name, pairs.get(name)))
            continue
        last = tasks[-1] if tasks else None
        if (
            last
            and last.name is None
            and last.source.file == source.file
            and last.source.start + last.size == source.start
            and last.at + last.size == at
        ):
            tasks[-1] = _Task(out, last.at, last.source, last.size + source.size, last.dtype)
        else:
            tasks.append(_Task(out, at, source, source.size, tensor.dtype))
    return tasks


class _Sources:
    """Files to read from, each opened once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def of(self, file: Path) -> int:
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
                self._stack.callback(os.close, self._open[file])
            return self._open[file]


def _copy(source: int, start: int, out: int, at: int, size: int) -> None:
    """Copy a range, in the kernel where the file systems can."""
    in_kernel = hasattr(os, "copy_file_range")
    done = 0
    while done < size:
        piece = min(_PIECE, size - done)
        if in_kernel:
            try:
                count = os.copy_file_range(source, out, piece, start + done, at + done)
            except OSError as error:
                if error.errno not in _NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source, min(piece, 1 << 20), start + done)
            count = _put(out, memoryview(data), at + done)
        if not count:
            raise TunesmithError("a file became shorter while it was copied: merge again")
        done += count


def _put(out: int, data: memoryview, at: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(out, data[done:], at + done)
    return done


def _get(source: int, into: Any, start: int) -> None:
    view, done = memoryview(into).cast("B"), 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], start + done)
        if not count:
            raise TunesmithError("a file became shorter while it was read: merge again")
        done += count


def _fill(task: _Task, sources: _Sources, room: _Room, products: Products, scale: float) -> bool:
    """Write one tensor, summed or only converted; return whether a sum changed a bit of it."""
    import numpy as np

    source = task.source
    columns = source.shape[-1] if source.shape else 1
    rows = math.prod(source.shape) // columns if columns else 0
    pair = [_matrix(sources, tensor) for tensor in task.pair] if task.pair else []
    width = Tensor(task.dtype, (1,)).size
    changed = False
    for first, last in _parts(rows, columns):
        count = (last - first) * columns
        new = _read(sources, source, first * columns, count, room, "in")
        values = room.take("values", count, np.float32)
        _widen(source.dtype, new, values)
        if source.dtype != task.dtype:
            # The export loads the base in the merged dtype: it is rounded before anything is added.
            new = _narrow(task.dtype, values, room.take("cast", count, _WORDS[task.dtype]), room)
            _widen(task.dtype, new, values)
        if pair:
            was = new
            delta = room.take("delta", count, np.float32)
            products.multiply(pair[1][first:last], pair[0], delta.reshape(last - first, columns))
            if scale != 1.0:
                delta *= np.float32(scale)
            delta += values
            new = _narrow(task.dtype, delta, room.take("out", count, _WORDS[task.dtype]), room)
            changed = changed or not np.array_equal(was, new)
        _put(task.out, memoryview(new).cast("B"), task.at + first * columns * width)
    return changed


def _parts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of blocks that cover `rows`, about equal: none is a single row left."""
    blocks = -(-rows // max(_LEAST_ROWS, _BLOCK // max(1, columns)))
    for number in range(blocks):
        yield number * rows // blocks, (number + 1) * rows // blocks


def _matrix(sources: _Sources, tensor: Stored) -> Any:
    """Return a float32 matrix of the adapter."""
    import numpy as np

    matrix = np.empty(tensor.shape, np.float32)
    _get(sources.of(tensor.file), matrix.reshape(-1), tensor.start)
    return matrix


# NumPy has no bfloat16: those are handled as the upper half of a float32.
_WORDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


def _widen(dtype: str, raw: Any, values: Any) -> None:
    """Write `raw` as float32 into `values`, exactly."""
    import numpy as np

    if dtype == "BF16":
        np.left_shift(raw, 16, out=values.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        values[:] = raw


def _narrow(dtype: str, values: Any, out: Any, room: _Room) -> Any:
    """Round float32 to the nearest of `dtype`, ties to even, into `out`. Spoils `values`."""
    import numpy as np

    if np.isnan(values.max(initial=0)):  # a maximum takes a NaN over any number
        raise Uncovered("a weight is not a number")
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # to infinity, as PyTorch
            out[:] = values
        return out
    bits = values.view(np.uint32)
    carry = room.take("carry", bits.size, np.uint32)
    np.right_shift(bits, 16, out=carry)
    carry &= 1
    carry += 0x7FFF
    bits += carry
    bits >>= 16
    out[:] = bits
    return out
