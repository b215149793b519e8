"""Blocks of elements: read, widened to float32, rounded to a model's dtype. Needs NumPy.

A block is a flat (one-dimensional) NumPy array. `raw` arrays contain the bytes of a file with the
dtype of WORDS; `values` are float32. Offsets and sizes of files are in bytes, lengths of arrays
in elements.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError
from tunesmith.job.merge.matmul import Array, Convert
from tunesmith.job.merge.tensors import Stored, Tensor

# NumPy's dtype of each safetensors dtype, little-endian. NumPy has no bfloat16: its bits are
# kept as uint16, the upper half of a float32.
WORDS = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


class NotANumber(Exception):
    """A block to round contains a NaN."""


@dataclass
class Scratch:
    """Flat arrays by name, reused between blocks: new pages cost more than the arithmetic."""

    arrays: dict[str, Array] = field(default_factory=dict)

    def take(self, name: str, count: int, dtype: Any) -> Array:
        """Return an array of shape [count] and `dtype`, with whatever was last written to it."""
        import numpy as np

        array = self.arrays.get(name)
        if array is None or array.size < count or array.dtype != dtype:
            array = self.arrays[name] = np.zeros(count, dtype)
        return array[:count]


class Sources:
    """Files for reading, each opened once: path -> file descriptor."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}

    def of(self, file: Path) -> int:
        """Return a file's descriptor; it is closed with the stack."""
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            self._stack.callback(os.close, self._open[file])
        return self._open[file]


def read(
    sources: Sources, tensor: Stored, first: int, count: int, scratch: Scratch, name: str
) -> Array:
    """Return elements `first` to `first + count` of a tensor: shape [count], raw dtype."""
    raw = scratch.take(name, count, WORDS[tensor.dtype])
    get(sources.of(tensor.file), raw, tensor.start + first * Tensor(tensor.dtype, (1,)).size)
    return raw


def get(source: int, into: Array, start: int) -> None:
    """Fill the array `into` (any shape and dtype) from byte `start` of descriptor `source`."""
    view, done = memoryview(into).cast("B"), 0
    while done < len(view):
        count = os.preadv(source, [view[done:]], start + done)
        if not count:
            raise TunesmithError("a file became shorter while it was read: merge again")
        done += count


def put(out: int, data: memoryview, at: int) -> int:
    """Write all of `data` to descriptor `out` at byte `at`; return the bytes written."""
    done = 0
    while done < len(data):
        done += os.pwrite(out, data[done:], at + done)
    return done


def widen(dtype: str, raw: Array, values: Array, convert: Convert | None = None) -> None:
    """Convert `raw` [n] of `dtype` exactly to float32 in `values` [n]."""
    import numpy as np

    if dtype != "BF16":
        values[:] = raw
    elif convert:
        convert(raw, values)
    else:
        np.left_shift(raw, 16, out=values.view(np.uint32), dtype=np.uint32, casting="unsafe")


def narrow(
    dtype: str, values: Array, out: Array, scratch: Scratch, convert: Convert | None = None
) -> Array:
    """Round `values` [n], float32, to `dtype` in `out` [n], raw: to nearest, ties to even.

    Returns `out`; `values` is overwritten. Raises NotANumber.
    """
    import numpy as np

    if np.isnan(values.max(initial=0)):  # the maximum is NaN if any element is
        raise NotANumber
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # to infinity, like PyTorch
            out[:] = values
        return out
    if convert:
        convert(values, out)
        return out
    bits = values.view(np.uint32)
    carry = scratch.take("carry", bits.size, np.uint32)
    np.right_shift(bits, 16, out=carry)
    carry &= 1
    carry += 0x7FFF
    bits += carry
    bits >>= 16
    out[:] = bits
    return out
