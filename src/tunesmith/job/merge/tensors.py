"""Offsets of tensors in safetensors files, and the headers of files to write.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, a JSON header
of that length, then the tensors without gaps. Headers written here have the order and padding of
the safetensors library (0.5, safetensors/src/tensor.rs, `prepare`), so that files with the same
tensors have the same bytes. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel.files import weight_files
from tunesmith.core.documents import JsonObject

# The library's enum in order; a file contains the last of them first.
_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "F64", "I64", "U64"),
)
_WIDTH = {name: 8 if name[-2:] == "64" else 4 if name[-2:] == "32" else 2 for name in _ORDER[5:]}
_ALIGNED = 8  # bytes: the header is padded with spaces
_METADATA = "__metadata__"
# {tensor: {"dtype", "shape", "data_offsets"}}, and the metadata: strings by name.
Header = dict[str, JsonObject]


@dataclass(frozen=True)
class Tensor:
    """A tensor's dtype (safetensors' name: BF16, F16, F32, ...) and shape, in elements."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its size in a file, in bytes."""
        return math.prod(self.shape) * _WIDTH.get(self.dtype, 1)


@dataclass(frozen=True)
class Stored(Tensor):
    """A tensor in a file; `start` is the offset of its first byte in that file."""

    file: Path
    start: int


def writable(dtype: str) -> bool:
    """Return whether this module can write tensors of `dtype` (safetensors' name)."""
    return dtype in _ORDER


def stored(file: Path) -> dict[str, Stored]:
    """Return all tensors of a safetensors file that basemodel.files.verify has checked."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: Header = json.loads(stream.read(length))
    return {
        name: Stored(
            entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != _METADATA
    }


def stored_below(folder: Path) -> dict[str, Stored]:
    """Return the tensors of all safetensors files that loading `folder` would use."""
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder):
        tensors |= stored(file)
    return tensors


def arranged(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return `names` in the order of a file."""
    return sorted(names, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))


def beginning(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file with these tensors, and each tensor's start offset in bytes.

    The metadata is that of transformers' save_pretrained: {"format": "pt"}.
    """
    header: Header = {_METADATA: {"format": "pt"}}
    starts: dict[str, int] = {}
    at = 0
    for name in arranged(tensors, tensors):
        tensor = tensors[name]
        starts[name] = at
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    before = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: before + s for n, s in starts.items()}
