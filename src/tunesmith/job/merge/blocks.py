"""Blocks of numbers: read, widened to float32, rounded to a model's dtype. Needs NumPy."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.job.merge.matmul import Convert
from tunesmith.job.merge.tensors import Stored, Tensor

# NumPy has no bfloat16: those are handled as the upper half of a float32.
WORDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


class NotANumber(Exception):
    """A block to round holds something that is not a number."""


@dataclass
class Room:
    """Memory kept from block to block: fresh pages cost more than the sums."""

    arrays: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, count: int, dtype: Any) -> Any:
        """Return an array of `count`, with whatever it held last."""
        import numpy as np

        held = self.arrays.get(name)
        if held is None or held.size < count or held.dtype != dtype:
            held = self.arrays[name] = np.zeros(count, dtype)
        return held[:count]


class Sources:
    """Files to read from, each opened once."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}

    def of(self, file: Path) -> int:
        """Return a file's descriptor, which is closed with the stack."""
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, self._open[file])
        return self._open[file]


def read(sources: Sources, tensor: Stored, first: int, count: int, room: Room, name: str) -> Any:
    """Return `count` numbers of a tensor, from number `first` on, as they lie in the file."""
    raw = room.take(name, count, WORDS[tensor.dtype])
    get(sources.of(tensor.file), raw, tensor.start + first * Tensor(tensor.dtype, (1,)).size)
    return raw


def get(source: int, into: Any, start: int) -> None:
    """Fill an array with a file's bytes from `start` on."""
    view, done = memoryview(into).cast("B"), 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], start + done)
        if not count:
            raise TunesmithError("a file became shorter while it was read: merge again")
        done += count


def put(out: int, data: memoryview, at: int) -> int:
    """Write all of `data` at `at`; return its length."""
    done = 0
    while done < len(data):
        done += os.pwrite(out, data[done:], at + done)
    return done


def widen(dtype: str, raw: Any, values: Any, convert: Convert | None = None) -> None:
    """Write `raw` as float32 into `values`, exactly."""
    import numpy as np

    if dtype != "BF16":
        values[:] = raw
    elif convert:
        convert(raw, values)
    else:
        np.left_shift(raw, 16, out=values.view(np.uint32), dtype=np.uint32, casting="unsafe")


def narrow(dtype: str, values: Any, out: Any, room: Room, convert: Convert | None = None) -> Any:
    """Round float32 to the nearest of `dtype`, ties to even, into `out`. Spoils `values`.

    Raises NotANumber.
    """
    import numpy as np

    if np.isnan(values.max(initial=0)):  # a maximum takes a NaN over any number
        raise NotANumber
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # to infinity, as PyTorch
            out[:] = values
        return out
    if convert:
        convert(values, out)
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
