"""Reading single tensors of a model folder, memory-mapped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.basemodel.files import weight_files
from tunesmith.job.merge.adapter import ADAPTER_WEIGHTS, AdapterFacts

_ROWS = 1024  # rows read at a time where whole tensors would double the memory


Tensor = Any  # torch.Tensor: torch is imported where it is used
Handle = Any  # an open file of safetensors


class TensorReader:
    """The tensors of a folder's safetensors files; each file is opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._handles: dict[str, Handle] = {}

    def __enter__(self) -> TensorReader:
        from safetensors import safe_open

        for file in weight_files(self._folder):
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
            self._handles |= dict.fromkeys(handle.keys(), handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def get(self, name: str) -> Tensor:
        """Return a tensor, in the shape and dtype of its file."""
        return self._handles[name].get_tensor(name)

    def rows(self, name: str, part: slice) -> Tensor:
        """Return rows `part` of a tensor, shape [rows, ...], in the dtype of its file."""
        return self._handles[name].get_slice(name)[part]


def lora_pairs(facts: AdapterFacts) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield (module, base tensor's name, lora_A [rank, in], lora_B [out, rank]), both float32."""
    from safetensors import safe_open

    with safe_open(facts.folder / ADAPTER_WEIGHTS, framework="pt") as handle:
        for module, name in facts.targets.items():
            names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
            a, b = (handle.get_tensor(tensor).float() for tensor in names)
            yield module, name, a, b


def row_parts(rows: int) -> Iterator[slice]:
    """Yield slices that together cover `rows` rows."""
    for start in range(0, rows, _ROWS):
        yield slice(start, min(start + _ROWS, rows))
