"""Forward and backward of a micro-batch, captured once per shape as a CUDA graph, then replayed.

One launch per step instead of some 7,000 (a 1.5B model; docs/performance.md). A graph reads and
writes the same memory each time, so inputs are copied to its input tensors, and loss and gradients
are read from its output tensors.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Each graph keeps a copy of the gradients; steps of further shapes run without a graph.
MAX_GRAPHS = 24
# Relative difference allowed between two computations of the same value: rounding over all layers
# of a model, some 1 % in bf16.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 0.001}

# (model, inputs on the device, number of trained tokens as a scalar tensor) -> the loss, a detached
# scalar tensor; gradients are accumulated in the parameters.
Step = Callable[[Any, Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RecordedStep:
    """A captured step of one shape: input tensors, graph, and output tensors."""

    inputs: Mapping[str, torch.Tensor]  # [lines, length], int64, on the GPU
    items: torch.Tensor  # trained tokens of the whole step, a scalar
    graph: torch.cuda.CUDAGraph
    loss: torch.Tensor  # a scalar
    gradients: list[tuple[torch.nn.Parameter, torch.Tensor]]  # same shape and dtype


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Use copies of the random generators in the context: dropout and row order do not change."""
    fork: contextlib.AbstractContextManager[None] = torch.random.fork_rng(
        [device] if device.type == "cuda" else []
    )
    return fork


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Return the 2-norm of all gradients together."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def close(values: Sequence[float], expected: Sequence[float], share: float) -> bool:
    """Whether each value is within a relative distance of the expected one; NaN never is."""
    return all(
        abs(one - two) <= share * abs(two) for one, two in zip(values, expected, strict=True)
    )


class GraphedSteps:
    """The captured steps of a training, by shape.

    `tolerance` is the allowed relative difference between a replayed and a computed step, None if
    they cannot be compared because the model uses dropout. `on_disabled` is called with the reason
    if capturing failed; from then on every step is computed.
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
        """Return the loss of a step (a scalar) from its graph, None if the caller must compute it.

        `inputs` are [lines, length], int64; `items` is a scalar. `whole`: the micro-batch is the
        whole step, so there are no gradients of other micro-batches.
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
        """Capture the step of a shape; if that fails, disable all graphs and return False."""
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
        # The memory of a failed capture belongs to the graph, which is deleted by now.
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
        """Return a captured step, None if it would permanently occupy too much memory."""
        buffers = {key: value.to(self._device).clone() for key, value in inputs.items()}
        count = items.clone()

        def forward_and_backward() -> torch.Tensor:
            for parameter in self._parameters:
                parameter.grad = None
            return self._step(model, buffers, count)

        model.train()
        started = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with forked_rng(self._device), torch.cuda.stream(side):
            # Kernels and workspaces created on first use must exist already.
            expected = (float(forward_and_backward()), gradient_norm(self._parameters))
        torch.cuda.current_stream().wait_stream(side)
        needed = torch.cuda.max_memory_allocated() - started
        torch.cuda.empty_cache()  # graphs have separate memory, shared by all of them
        # The first time all of it is new, and a step without a graph needs the same again.
        free = torch.cuda.mem_get_info()[0]
        if not self._recorded and 2.2 * needed > free:
            return None
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads (the loader's) continue to allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = forward_and_backward()
        gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        with forked_rng(self._device):
            graph.replay()
            replayed = (float(loss), gradient_norm(self._parameters))
        if self._tolerance is not None and not close(replayed, expected, self._tolerance):
            raise RuntimeError(f"replayed loss and gradient norm {replayed}, computed {expected}")
        return RecordedStep(buffers, count, graph, loss, gradients)

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
                # The next replay of this shape overwrites this gradient.
                parameter.grad = gradient if whole else gradient.clone()
        return recorded.loss.clone()
