"""Cheaper training steps on a CPU, through fewer passes over memory.

A CPU waits for memory, not for launches. Two parts of a LoRA step on 1,200 tokens of a 135M model
take some 9 % of its time each for unneeded work (docs/performance.md):

- The head, the largest matrix, computes logits for every token, but prompt tokens have no label:
  here it is computed only at target positions.
- PEFT scales the adapter's output and then adds it, each a pass over a matrix as wide as the
  layer. Here the narrow matrix between its two products is scaled, and the second product adds to
  the layer's result in place.

Imports PEFT and LLaMA-Factory: only the worker of the train phase loads this module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX
from peft.tuners.lora import layer as lora


def target_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions whose next token has a label, and the ids of these tokens.

    `labels` is [lines, length], int64; both results are [targets], int64. Positions index the
    flattened lines: line 1 starts at the length of line 0.
    """
    after = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    positions = (after != IGNORE_INDEX).nonzero()[:, 0]
    return positions, after[positions]


@contextlib.contextmanager
def select_positions(head: torch.nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Inside the context a head computes only these positions, as one line.

    `positions` is [positions], int64, into the flattened lines. The head gets
    [lines, length, width] and returns [1, positions, vocabulary], both in its compute dtype.
    """

    def select(_module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        return arguments[0].flatten(0, 1)[positions].unsqueeze(0)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def add_in_place(model: torch.nn.Module) -> int:
    """Let each plain LoRA layer add its adapter in place; return the number of changed layers.

    Plain: a frozen nn.Linear, one adapter, no DoRA, no own bias. Other layers keep PEFT's code.
    """
    layers = [module for module in model.modules() if _is_plain(module)]
    for module in layers:
        module.forward = functools.partial(_forward, module, module.forward)
    return len(layers)


def _is_plain(module: torch.nn.Module) -> bool:
    return (
        type(module) is lora.Linear
        and type(module.base_layer) is torch.nn.Linear
        and len(module.active_adapters) == 1
        and not any(module.use_dora.values())
        and all(part.bias is None for part in module.lora_B.values())
    )


def _forward(module: Any, plain: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute a LoRA layer: `x` [..., in] gives [..., out], in the layer's compute dtype."""
    if args or kwargs or module.disable_adapters or module.merged:
        output: torch.Tensor = plain(x, *args, **kwargs)
        return output
    name = module.active_adapters[0]
    # In place is free for a matrix; for a view of it the backward pass would copy.
    rows = x.flatten(0, -2)
    result = module.base_layer(rows)
    down, up = module.lora_A[name], module.lora_B[name].weight
    narrow = module.lora_dropout[name](module._cast_input_dtype(rows, down.weight.dtype))
    narrow = down(narrow) * module.scaling[name]
    with torch.autocast(result.device.type, enabled=False):
        result.addmm_(narrow.to(result.dtype), up.to(result.dtype).T)
    return result.view(*x.shape[:-1], -1)
