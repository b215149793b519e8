"""Forward and backward of a micro-batch, recorded once a shape as a CUDA graph, then replayed.

One launch a step instead of some 7,000 (a 1.5B model; docs/performance.md). A graph reads and
writes the same memory each time, so inputs are copied to where it reads, and loss and gradients
are taken from where it writes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Each graph keeps a copy of the gradients; data with more shapes runs the rest as it comes.
MAX_GRAPHS = 24
# How far two ways to compute the same may lie apart, as a share: rounding over all layers of a
# model, some 1 % in bf16.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 0.001}

# (model, inputs on the device, number of trained tokens as a scalar) -> the loss, detached, a
# scalar; gradients are added to the parameters'.
Step = Callable[[Any, Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RecordedStep:
    """A step of one shape: what it reads, its graph, and where it leaves loss and gradients."""

    inputs: Mapping[str, torch.Tensor]  # (lines x length), on the GPU
    items: torch.Tensor  # trained tokens of the whole step, a scalar
    graph: torch.cuda.CUDAGraph
    loss: torch.Tensor  # a scalar
    gradients: list[tuple[torch.nn.Parameter, torch.Tensor]]  # of one shape and dtype each


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Draw random numbers from copies in this block: dropout and the rows' order stay."""
    fork: contextlib.AbstractContextManager[None] = torch.random.fork_rng(
        [device] if device.type == "cuda" else []
    )
    return fork


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Return the norm of all gradients together."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def close(values: Sequence[float], expected: Sequence[float], share: float) -> bool:
    """Whether each value is within a share of the expected one; NaN is near nothing."""
    return all(
        abs(one - two) <= share * abs(two) for one, two in zip(values, expected, strict=True)
    )


class GraphedSteps:
    """The recorded steps of a training, by shape.

    `tolerance` is the share by which a replayed step may differ from a computed one; None where
    they cannot be compared, because the model drops out. `on_disabled` is called with the
    reason when recording failed; from then on every step is computed.
    """

    def __init__(
        self,
        step: Step,
        parameters: Sequence[torch.nn.Parameter],
        device: torch.device,
        tolerance: float | None,
        on_disabled: Callable[[str], None],
    ) -> None:
        self._step = step
        self._parameters = parameters
        self._device = device
        self._tolerance = tolerance
        self._on_disabled = on_disabled
        self._recorded: dict[tuple[int, ...], RecordedStep] = {}
        self._pool: Any = None  # memory that all graphs share
        self._enabled = True

    def run(
        self, model: Any, inputs: Mapping[str, torch.Tensor], items: torch.Tensor, *, whole: bool
    ) -> torch.Tensor | None:
        """Return the loss of a step by its graph; None where the caller must compute it.

        `whole`: the micro-batch is the whole step, so no gradients of others are there.
        """
        if not self._enabled:
            return None
        shape = tuple(inputs["input_ids"].shape)
        if shape not in self._recorded and (
            len(self._recorded) >= MAX_GRAPHS or not self._record(shape, model, inputs, items)
        ):
            return None
        return self._replay(self._recorded[shape], inputs, items, whole=whole)

    def _record(
        self,
        shape: tuple[int, ...],
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        items: torch.Tensor,
    ) -> bool:
        """Record the step of a shape; where that fails, disable all and return False."""
        before = [parameter.grad for parameter in self._parameters]
        why = None
        try:
            recorded = self._recording(model, inputs, items)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            why = (str(error) or type(error).__name__).partition(". ")[0]
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
        if why is None and recorded is not None:
            self._recorded[shape] = recorded
            return True
        # A failed recording leaves its memory with the graph, which is gone by now.
        self._enabled = False
        self._recorded.clear()
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()
        self._on_disabled(why or "the GPU's memory has no room for a recorded step")
        return False

    def _recording(
        self, model: Any, inputs: Mapping[str, torch.Tensor], items: torch.Tensor
    ) -> RecordedStep | None:
        """Return a recorded step; None where its memory, held for good, would be too much."""
        held = {key: value.to(self._device).clone() for key, value in inputs.items()}
        count = items.clone()

        def forward_and_backward() -> torch.Tensor:
            for parameter in self._parameters:
                parameter.grad = None
            return self._step(model, held, count)

        model.train()
        started = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with forked_rng(self._device), torch.cuda.stream(side):
            # Kernels and workspaces that come with a first use must be there already.
            expected = (float(forward_and_backward()), gradient_norm(self._parameters))
        torch.cuda.current_stream().wait_stream(side)
        needed = torch.cuda.max_memory_allocated() - started
        torch.cuda.empty_cache()  # a graph has memory of its own, shared by all of them
        # The first time all of it is new; and a shape that runs as it comes needs as much again.
        free = torch.cuda.mem_get_info()[0]
        if not self._recorded and 2.2 * needed > free:
            return None
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads (the loader's) go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = forward_and_backward()
        gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        with forked_rng(self._device):
            graph.replay()
            replayed = (float(loss), gradient_norm(self._parameters))
        if self._tolerance is not None and not close(replayed, expected, self._tolerance):
            raise RuntimeError(f"replayed loss and gradient norm {replayed}, computed {expected}")
        return RecordedStep(held, count, graph, loss, gradients)

    def _replay(
        self,
        recorded: RecordedStep,
        inputs: Mapping[str, torch.Tensor],
        items: torch.Tensor,
        *,
        whole: bool,
    ) -> torch.Tensor:
        for key, value in recorded.inputs.items():
            value.copy_(inputs[key], non_blocking=True)
        recorded.items.copy_(items, non_blocking=True)
        recorded.graph.replay()
        for parameter, gradient in recorded.gradients:
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            else:
                # The next replay of this shape writes where this one wrote.
                parameter.grad = gradient if whole else gradient.clone()
        return recorded.loss.clone()
