"""Stand-in for a GPU that runs out of memory, on machines that have none.

Run at the start of a worker (overlay.py). A training step with more rows than STANDIN_GPU_ROWS
raises what PyTorch raises on a real GPU, with its words; with gradient checkpointing on,
one more row fits. Everything else is the real trainer.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

_ROWS = int(os.environ["STANDIN_GPU_ROWS"])
_step = transformers.Trainer.training_step


def _training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
    checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    if inputs["input_ids"].shape[0] > _ROWS + checkpointing:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB.")
    return _step(self, model, inputs, *args)


transformers.Trainer.training_step = _training_step
