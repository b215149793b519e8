"""The fast preset's trainer: the same rows in the same steps, computed with less waiting.

LLaMA-Factory's trainer pads each row of a batch to the longest one and launches every kernel
of a step from Python. For short rows a GPU mostly waits: one step of a 1.5B model is some 7,000
launches whatever its length (docs/performance.md). This trainer changes how a step is computed,
and not what it computes:

- A step takes its whole effective batch at once where memory allows; what fits is tried on the
  longest rows before the first step.
- The rows of a micro-batch are laid end to end, with an attention mask that keeps each to
  itself and positions that start anew, so that hardly anything is padding.
- On one GPU, forward and backward of each shape are recorded once as a CUDA graph and then
  replayed: one launch a step.
- On a processor the head is computed where something is learnt, and adapters add in place
  (cpu_step.py). A recorded step has one shape, so a GPU computes the whole head.

Loss and gradients are the padded batch's up to rounding; that is checked on real rows before
the first step, and where it does not hold, or a model is of another kind than those known to
work, rows are padded as ever, and an event says so.

Imports transformers and LLaMA-Factory: only the worker of the train phase loads this module.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from tunesmith.core.patching import install
from tunesmith.job.patches.llamafactory import OUR_TRAINER
from tunesmith.job.run.failures import JobError
from tunesmith.job.system import resources
from tunesmith.job.training import cpu_lora

# Decoders whose transformers 4.52 code takes a 4-D mask and position ids as they are.
KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Tokens a line of laid-out rows may have: the mask of a line grows with its square.
LINE_TOKENS = 2048
# Lengths are rounded up to this: few shapes, so few graphs, and SDPA's kernels want 8.
MULTIPLE = 128
# A processor is busy with the attention of a long line, and waits for no launches (measured:
# 4 lines of 320 tokens take 0.7 of the time of 8 of 176, and 0.5 of that of one of 1,024).
CPU_LINE_TOKENS = 320
CPU_MULTIPLE = 32
# Of the machine's free memory; the rest is for what else grows.
_SHARE = 0.7
# Each graph keeps a copy of the gradients; data with more shapes runs the rest as it comes.
MAX_GRAPHS = 24
# How far two ways to compute logits may lie apart, as a share of their norm: rounding over all
# layers of a model, some 1 % in bf16.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 0.001}


def lay_out(lengths: Sequence[int], line: int = LINE_TOKENS) -> list[list[int]]:
    """Return lines of row numbers, balanced, each of at most `line` tokens where rows are.

    A row longer than `line` makes that the limit for all.
    """
    limit = max(line, *lengths)
    count = -(-sum(lengths) // limit)
    while True:
        lines: list[list[int]] = [[] for _ in range(count)]
        fill = [0] * count
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            least = fill.index(min(fill))
            lines[least].append(row)
            fill[least] += lengths[row]
        if max(fill) <= limit:
            return lines
        count += 1


def end_to_end(
    batch: Mapping[str, torch.Tensor],
    pad_id: int,
    line_tokens: int = LINE_TOKENS,
    multiple: int = MULTIPLE,
) -> dict[str, torch.Tensor]:
    """Return a right-padded batch (rows x length) as lines without padding between rows.

    `marks` (lines x length) numbers the rows of a line from 1; 0 is padding. `position_ids`
    start at 0 in each row. A row's first label is never learnt, here as in the padded batch.
    """
    lengths = [int(n) for n in batch["attention_mask"].sum(dim=1)]
    lines = lay_out(lengths, line_tokens)
    longest = max(sum(lengths[row] for row in line) for line in lines)
    shape = (len(lines), -(-longest // multiple) * multiple)
    laid = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "marks": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
    }
    for number, line in enumerate(lines):
        at = 0
        for mark, row in enumerate(line, start=1):
            length = lengths[row]
            place = (number, slice(at, at + length))
            laid["input_ids"][place] = batch["input_ids"][row, :length]
            laid["labels"][place] = batch["labels"][row, :length]
            laid["labels"][number, at] = IGNORE_INDEX
            laid["marks"][place] = mark
            laid["position_ids"][place] = torch.arange(length)
            at += length
    return laid


def mask_of(marks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask (lines x 1 x length x length) that keeps rows apart, causal."""
    length = marks.shape[1]
    same = (marks[:, None, :] == marks[:, :, None]) & (marks[:, None, :] != 0)
    allowed = same & torch.ones(length, length, dtype=torch.bool, device=marks.device).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=marks.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def without_labels(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a model takes to compute logits and no loss."""
    return {key: value for key, value in inputs.items() if key != "labels"}


def norm_of(parameters: Sequence[torch.nn.Parameter]) -> float:
    """Return the norm of all gradients together."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def close(found: Sequence[float], expected: Sequence[float], share: float) -> bool:
    """Whether each number is within a share of the expected one; NaN is near nothing."""
    return all(abs(one - two) <= share * abs(two) for one, two in zip(found, expected, strict=True))


@dataclass
class EndToEnd:
    """A collator: LLaMA-Factory's own, then rows laid end to end."""

    plain: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    lay: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the lines of a micro-batch."""
        return self.lay(self.plain(features))


@dataclass(frozen=True)
class Recorded:
    """A step of one shape: what it reads, its graph, and where it leaves loss and gradients."""

    inputs: Mapping[str, torch.Tensor]
    items: torch.Tensor
    graph: torch.cuda.CUDAGraph
    loss: torch.Tensor
    gradients: list[tuple[torch.nn.Parameter, torch.Tensor]]


def use(
    config: Mapping[str, Any],
    emit: Callable[..., None],
    keep: Callable[[Mapping[str, Any]], None],
) -> None:
    """Make LLaMA-Factory's supervised fine-tuning use this trainer.

    `keep` records changed config keys for later attempts: a resumed run must not try again,
    because its steps are counted in micro-batches.
    """

    class Trainer(FastTrainer):
        def __init__(self, **kwargs: Any) -> None:
            self.emit, self.keep = emit, keep
            self.end_to_end = not any(
                config.get(key) for key in ("packing", "neat_packing", "train_on_prompt")
            )
            super().__init__(**kwargs)

    install(OUR_TRAINER, Trainer)


class FastTrainer(CustomSeq2SeqTrainer):  # type: ignore[misc]
    """LLaMA-Factory's trainer with another way through a step."""

    emit: Callable[..., None]
    keep: Callable[[Mapping[str, Any]], None]
    end_to_end: bool
    data_collator: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._recorded: dict[tuple[Any, ...], Recorded] = {}
        self._pool: Any = None
        if self.args.bf16 or self.args.fp16:
            # Autocast casts to half precision; PEFT would cast to float32 before it: the same
            # numbers, and two passes over each activation more.
            for module in self.model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False
        config = self.model.config
        sliding = getattr(config, "sliding_window", None) and (
            getattr(config, "use_sliding_window", True)
        )
        if self.end_to_end and (
            config.model_type not in KNOWN_MODELS
            or sliding
            or config._attn_implementation != "sdpa"
            or getattr(self.processing_class, "padding_side", "right") != "right"
        ):
            self._pad_as_ever(f"a {config.model_type} model of this kind was not tried so")
        one = self.args.world_size == 1 and self.args.n_gpu <= 1
        self._drops_out = any(
            isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.model.modules()
        )
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        if one and self.accelerator.distributed_type == "NO":
            self._skip_frozen()
        self._head: Any = None
        if one and self.args.device.type == "cpu" and config.model_type in KNOWN_MODELS:
            cpu_lora.add_in_place(self.model)
            if self.label_smoother is None:
                self._head = self.model.get_output_embeddings()
        self._graphs = (
            self.end_to_end
            and one
            and self.args.device.type == "cuda"
            and not self.args.fp16  # its gradient scaler looks at each step's gradients
            and self.accelerator.distributed_type == "NO"
            and not getattr(self.model, "is_gradient_checkpointing", False)
        )
        if one and self.args.include_num_input_tokens_seen:
            # The trainer asks the GPU for this number each step, and so waits for it.
            self.args.include_num_input_tokens_seen = False
            self._count = True
        else:
            self._count = False

    def get_train_dataloader(self) -> Any:
        """Return the loader of training rows; evaluation keeps the plain collator."""
        plain = self.data_collator
        if self.end_to_end:
            self.data_collator = EndToEnd(plain, self._lay)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Check on real rows, try what fits, train."""
        resumed = kwargs.get("resume_from_checkpoint") or (args and args[0])
        with self._same_chance():
            if self.end_to_end:
                self._compare()
            if not resumed and self.args.world_size == 1:
                self._fit()
        return super().train(*args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch: replayed where it was recorded."""
        if self._count:
            self.state.num_input_tokens_seen += inputs["input_ids"].numel()
        if "marks" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        shape = tuple(inputs["input_ids"].shape)
        if not self._graphs or not torch.is_tensor(num_items_in_batch):
            return super().training_step(model, self._opened(inputs), num_items_in_batch)
        if shape not in self._recorded and (
            len(self._recorded) >= MAX_GRAPHS or not self._record(model, inputs, num_items_in_batch)
        ):
            return super().training_step(model, self._opened(inputs), num_items_in_batch)
        return self._replay(self._recorded[shape], inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **more: Any
    ) -> Any:
        """Return the model's own loss, of a head that computes what is learnt."""
        if self._head is None or return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **more)
        places, tokens = cpu_lora.learnt(inputs["labels"])
        with cpu_lora.only_at(self._head, places):
            return super().compute_loss(model, {**inputs, "shift_labels": tokens}, **more)

    def _same_chance(self) -> Any:
        """Within this, random numbers are drawn from copies: dropout and the rows' order stay."""
        return torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else [])

    def _opened(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what the model takes: marks become a mask."""
        opened = dict(inputs)
        marks = opened.pop("marks").to(self.args.device)
        opened["attention_mask"] = mask_of(marks, self._dtype())
        return opened

    def _line(self) -> tuple[int, int]:
        """Return the tokens a line may have, and what its length is a multiple of."""
        if self.args.device.type == "cuda":
            return LINE_TOKENS, MULTIPLE
        return CPU_LINE_TOKENS, CPU_MULTIPLE

    def _lay(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return end_to_end(batch, int(self.processing_class.pad_token_id), *self._line())

    def _dtype(self) -> torch.dtype:
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else torch.float32

    def _record(self, model: Any, inputs: Mapping[str, torch.Tensor], items: torch.Tensor) -> bool:
        """Record the step of this shape; False, with an event, where that cannot be done."""
        parameters = self._trainable
        before = [parameter.grad for parameter in parameters]
        why = None
        try:
            recorded = self._recording(model, inputs, items)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            why = (str(error) or type(error).__name__).partition(". ")[0]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        if why is None and recorded is not None:
            self._recorded[tuple(inputs["input_ids"].shape)] = recorded
            return True
        # A failed recording leaves its memory with the graph, which is gone by now.
        self._graphs = False
        self._recorded.clear()
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()
        why = why or "the GPU's memory does not hold a recorded step too"
        self.emit("changed", what="CUDA graphs", to="no more", why=why, **{"from": "on"})
        return False

    def _recording(
        self, model: Any, inputs: Mapping[str, torch.Tensor], items: torch.Tensor
    ) -> Recorded | None:
        """Return a recorded step; None where its memory, held for good, would be too much."""
        held = {key: value.to(self.args.device).clone() for key, value in inputs.items()}
        count = items.clone()
        parameters = self._trainable

        def forward_and_backward() -> torch.Tensor:
            for parameter in parameters:
                parameter.grad = None
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._opened(held), num_items_in_batch=count)
            self.accelerator.backward(loss)
            return loss.detach()

        model.train()
        started = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with self._same_chance(), torch.cuda.stream(side):
            # Kernels and workspaces that come with a first use must be there already.
            expected = (float(forward_and_backward()), norm_of(parameters))
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
        gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        with self._same_chance():
            graph.replay()
            found = (float(loss), norm_of(parameters))
        if not self._drops_out and not close(found, expected, TOLERANCE[self._dtype()]):
            raise RuntimeError(f"replayed loss and gradient norm {found}, computed {expected}")
        return Recorded(held, count, graph, loss, gradients)

    def _replay(
        self, recorded: Recorded, inputs: Mapping[str, torch.Tensor], items: torch.Tensor
    ) -> torch.Tensor:
        for key, value in recorded.inputs.items():
            value.copy_(inputs[key], non_blocking=True)
        recorded.items.copy_(items, non_blocking=True)
        recorded.graph.replay()
        once = self.args.gradient_accumulation_steps == 1
        for parameter, gradient in recorded.gradients:
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            else:
                # The next replay of this shape writes where this one wrote.
                parameter.grad = gradient if once else gradient.clone()
        return recorded.loss.clone()

    def _skip_frozen(self) -> None:
        """Clip and clear the gradients there are, without a walk through the whole model.

        The trainer does both each step for every parameter, and a LoRA model of 28 layers has
        over a thousand modules to walk through: 15 ms, as long as the GPU needs for the step.
        """

        def clip(_parameters: Any, most: float, norm_type: float = 2.0) -> torch.Tensor:
            self.accelerator.unscale_gradients()
            return torch.nn.utils.clip_grad_norm_(self._trainable, most, norm_type=norm_type)

        def clear(set_to_none: bool = True) -> None:
            for parameter in self._trainable:
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad.zero_()

        self.accelerator.clip_grad_norm_ = clip
        self.model.zero_grad = clear

    def _compare(self) -> None:
        """Pad as ever unless both ways give the same logits on the first rows."""
        padded = self.data_collator(self._rows(range(min(4, len(self.train_dataset)))))
        laid = self._lay(padded)
        real = padded["attention_mask"].bool()
        was = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            expected, found = (
                self.model(**self._prepare_inputs(inputs)).logits.float().cpu()
                for inputs in (without_labels(padded), without_labels(self._opened(laid)))
            )
        self.model.train(was)
        lengths = [int(n) for n in real.sum(dim=1)]
        order = [row for line in lay_out(lengths, self._line()[0]) for row in line]
        wanted = torch.cat([expected[row, : lengths[row]] for row in order])
        error = float((found[laid["marks"] > 0] - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE[self._dtype()]:
            self._pad_as_ever(f"the first rows' logits would differ by {error:.1%}")

    def _pad_as_ever(self, why: str) -> None:
        self.end_to_end = self._graphs = False
        self.emit("changed", what="rows end to end", to="padded", why=why, **{"from": "on"})

    def _fit(self) -> None:
        """Lower the micro-batch until its longest rows fit; the effective batch stays."""
        lengths = [len(row) for row in self.train_dataset["input_ids"]]
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        asked = self.args.per_device_train_batch_size
        divisors = [d for d in range(asked, 0, -1) if asked % d == 0]
        if self.args.device.type == "cuda":
            where = "the GPU's memory"
            fitting = (d for d in divisors if self._fits(self._rows(longest[:d])))
        else:
            # A process that takes too much is killed, so one row is measured and counted up.
            where = "the memory"
            room = _SHARE * resources.memory_available() / self._held_by(self._rows(longest[:1]))
            fitting = (d for d in divisors if d <= room)
        micro = next(fitting, None)
        steps = self.args.gradient_accumulation_steps * (asked // (micro or 1))
        change = {"per_device_train_batch_size": micro or 1, "gradient_accumulation_steps": steps}
        self.keep(change)
        if micro is None and where != "the memory":
            raise JobError(
                "gpu_oom", f"one row of {lengths[longest[0]]} tokens does not fit {where}"
            )
        if micro != asked:
            key = "per_device_train_batch_size"
            why = f"{asked} of the longest rows do not fit {where}"
            self.emit("changed", what=key, to=micro or 1, why=why, **{"from": asked})
            for key, value in change.items():
                setattr(self.args, key, value)
            self._train_batch_size = self.args.train_batch_size

    def _rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [dict(self.train_dataset[number]) for number in numbers]

    def _held_by(self, rows: list[dict[str, Any]]) -> int:
        """Return the bytes that a pass over these rows takes at its most."""
        return max(1, resources.growth_during(lambda: self._fits(rows)))

    def _fits(self, rows: list[dict[str, Any]]) -> bool:
        """Whether forward and backward of these rows fit; leaves no gradient and no memory."""
        inputs = self.data_collator(rows)
        if self.end_to_end:
            inputs = self._opened(self._lay(inputs))
        self.model.train()
        try:
            with self.accelerator.autocast():
                loss = self.compute_loss(self.model, self._prepare_inputs(inputs))
            loss.backward()
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            del inputs
            loss = None
            gc.collect()
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
        return True
