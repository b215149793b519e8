"""The fast preset's trainer: the same rows in the same steps, computed with less waiting.

LLaMA-Factory's trainer pads each row of a batch to the longest one and launches every kernel of a
step from Python. With short rows a GPU mostly waits: one step of a 1.5B model is some 7,000
launches, whatever its length (docs/performance.md). This trainer changes how a step is computed,
but not what it computes:

- A step processes its whole effective batch at once if memory allows; the longest rows are tried
  before the first step.
- The rows of a micro-batch are packed end to end, with an attention mask that separates them and
  positions that start at 0, so that there is hardly any padding (packing.py).
- On one GPU, forward and backward of each shape are captured once as a CUDA graph and then
  replayed: one launch per step (cuda_graphs.py).
- On a CPU the head is computed only at target positions, and adapters are added in place
  (cpu_lora.py). A captured step has a fixed shape, so a GPU computes the whole head.

Loss and gradients equal the padded batch's up to rounding. That is checked on real rows before the
first step; if it fails, or the model's architecture is not supported, rows are padded and an event
says so.

Imports transformers and LLaMA-Factory: only the worker of the train phase loads this module.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from tunesmith.core.documents import Columns, Config
from tunesmith.core.patching import install
from tunesmith.job.patches.llamafactory import OUR_TRAINER
from tunesmith.job.run.failures import JobError
from tunesmith.job.system import resources
from tunesmith.job.training import cpu_lora
from tunesmith.job.training.cuda_graphs import TOLERANCE, GraphedSteps, forked_rng
from tunesmith.job.training.packing import (
    CPU_LINE_TOKENS,
    CPU_MULTIPLE,
    LINE_TOKENS,
    MULTIPLE,
    Batch,
    PackedCollator,
    bin_pack,
    pack_rows,
    segment_mask,
)

# Decoders whose transformers 4.52 code uses a 4-D mask and position ids unchanged.
KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# Share of the machine's free memory; the rest is a reserve.
_SHARE = 0.7


def without_labels(inputs: Batch) -> dict[str, torch.Tensor]:
    """Return a batch without labels, so that a model computes logits but no loss."""
    return {key: value for key, value in inputs.items() if key != "labels"}


def use(
    config: Config,
    emit: Callable[..., None],
    keep: Callable[[Mapping[str, int]], None],
) -> None:
    """Let LLaMA-Factory's supervised fine-tuning use this trainer.

    `keep` records changed config keys for later attempts: a resumed run must not search again,
    because its steps are counted in micro-batches.
    """

    class Trainer(FastTrainer):
        def __init__(self, **kwargs: Any) -> None:
            self.emit, self.keep = emit, keep
            self.packs = not any(
                config.get(key) for key in ("packing", "neat_packing", "train_on_prompt")
            )
            super().__init__(**kwargs)

    install(OUR_TRAINER, Trainer)


class FastTrainer(CustomSeq2SeqTrainer):  # type: ignore[misc]
    """LLaMA-Factory's trainer with a faster step."""

    emit: Callable[..., None]
    keep: Callable[[Mapping[str, int]], None]
    packs: bool  # whether rows are packed
    data_collator: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.args.bf16 or self.args.fp16:
            # Autocast casts to half precision; PEFT would cast to float32 before: the same values
            # with two more passes over each activation.
            for module in self.model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False
        config = self.model.config
        sliding = getattr(config, "sliding_window", None) and (
            getattr(config, "use_sliding_window", True)
        )
        if self.packs and (
            config.model_type not in KNOWN_MODELS
            or sliding
            or config._attn_implementation != "sdpa"
            or getattr(self.processing_class, "padding_side", "right") != "right"
        ):
            self._fall_back_to_padding(
                f"packing is untested with a {config.model_type} model of this kind"
            )
        one = self.args.world_size == 1 and self.args.n_gpu <= 1
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        if one and self.accelerator.distributed_type == "NO":
            self._skip_frozen()
        self._head: Any = None
        if one and self.args.device.type == "cpu" and config.model_type in KNOWN_MODELS:
            cpu_lora.add_in_place(self.model)
            if self.label_smoother is None:
                self._head = self.model.get_output_embeddings()
        graphs = (
            self.packs
            and one
            and self.args.device.type == "cuda"
            and not self.args.fp16  # its gradient scaler reads each step's gradients
            and self.accelerator.distributed_type == "NO"
            and not getattr(self.model, "is_gradient_checkpointing", False)
        )
        self._graphs = self._graphed_steps() if graphs else None
        if one and self.args.include_num_input_tokens_seen:
            # The trainer reads this number from the GPU in each step, and so waits for it.
            self.args.include_num_input_tokens_seen = False
            self._count = True
        else:
            self._count = False

    def get_train_dataloader(self) -> Any:
        """Return the loader of training rows; evaluation uses the plain collator."""
        plain = self.data_collator
        if self.packs:
            self.data_collator = PackedCollator(plain, self._pack)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Compare real rows, find the micro-batch that fits, and train."""
        resumed = kwargs.get("resume_from_checkpoint") or (args and args[0])
        with forked_rng(self.args.device):
            if self.packs:
                self._compare()
            if not resumed and self.args.world_size == 1:
                self._fit()
        return super().train(*args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run forward and backward of one micro-batch, replaying it if it was captured.

        `inputs` are [lines, length] if packed, else [rows, length], int64. Returns the
        micro-batch's share of the step's loss in nat per trained token, a scalar.
        """
        if self._count:
            self.state.num_input_tokens_seen += inputs["input_ids"].numel()
        if "segment_ids" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._graphs is not None and torch.is_tensor(num_items_in_batch):
            whole = self.args.gradient_accumulation_steps == 1
            loss = self._graphs.run(model, inputs, num_items_in_batch, whole=whole)
            if loss is not None:
                return loss
        return super().training_step(model, self._with_mask(inputs), num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **more: Any
    ) -> Any:
        """Return the model's own loss, with the head computed only at target positions."""
        if self._head is None or return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **more)
        positions, tokens = cpu_lora.target_positions(inputs["labels"])
        with cpu_lora.select_positions(self._head, positions):
            return super().compute_loss(model, {**inputs, "shift_labels": tokens}, **more)

    def _with_mask(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """Replace segment ids [lines, length] by an attention mask [lines, 1, length, length]."""
        taken = dict(inputs)
        segment_ids = taken.pop("segment_ids").to(self.args.device)
        taken["attention_mask"] = segment_mask(segment_ids, self._dtype())
        return taken

    def _line(self) -> tuple[int, int]:
        """Return the most tokens of a line, and the multiple that its length is rounded up to."""
        if self.args.device.type == "cuda":
            return LINE_TOKENS, MULTIPLE
        return CPU_LINE_TOKENS, CPU_MULTIPLE

    def _pack(self, batch: Batch) -> dict[str, torch.Tensor]:
        return pack_rows(batch, int(self.processing_class.pad_token_id), *self._line())

    def _dtype(self) -> torch.dtype:
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else torch.float32

    def _graphed_steps(self) -> GraphedSteps:
        def step(model: Any, inputs: Batch, items: torch.Tensor) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._with_mask(inputs), num_items_in_batch=items)
            self.accelerator.backward(loss)
            detached: torch.Tensor = loss.detach()
            return detached

        def on_disabled(why: str) -> None:
            self.emit("changed", what="CUDA graphs", to="off", why=why, **{"from": "on"})

        drops_out = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.model.modules())
        tolerance = None if drops_out else TOLERANCE[self._dtype()]
        return GraphedSteps(step, self._trainable, self.args.device, tolerance, on_disabled)

    def _skip_frozen(self) -> None:
        """Clip and clear only existing gradients, without traversing the whole model.

        The trainer does both in each step for every parameter, and a LoRA model of 28 layers has
        over a thousand modules to traverse: 15 ms, as long as the GPU needs for the step.
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
        """Fall back to padding unless packed and padded rows give the same logits."""
        padded = self.data_collator(self._rows(range(min(4, len(self.train_dataset)))))
        packed = self._pack(padded)
        real = padded["attention_mask"].bool()
        was = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            expected, logits = (
                self.model(**self._prepare_inputs(inputs)).logits.float().cpu()
                for inputs in (without_labels(padded), without_labels(self._with_mask(packed)))
            )
        self.model.train(was)
        lengths = [int(n) for n in real.sum(dim=1)]
        order = [row for line in bin_pack(lengths, self._line()[0]) for row in line]
        # Both [tokens, vocabulary], in the order of the lines.
        reference = torch.cat([expected[row, : lengths[row]] for row in order])
        error = float((logits[packed["segment_ids"] > 0] - reference).norm() / reference.norm())
        if not error <= TOLERANCE[self._dtype()]:
            self._fall_back_to_padding(f"the first rows' logits would differ by {error:.1%}")

    def _fall_back_to_padding(self, why: str) -> None:
        self.packs = False
        self._graphs = None
        self.emit("changed", what="packed rows", to="padded", why=why, **{"from": "on"})

    def _fit(self) -> None:
        """Lower the micro-batch until its longest rows fit; the effective batch stays the same."""
        lengths = [len(row) for row in self.train_dataset["input_ids"]]
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        requested = self.args.per_device_train_batch_size
        divisors = [d for d in range(requested, 0, -1) if requested % d == 0]
        if self.args.device.type == "cuda":
            where = "the GPU's memory"
            fitting = (d for d in divisors if self._fits(self._rows(longest[:d])))
        else:
            # A process that uses too much memory is killed, so measure one row and scale up.
            where = "the memory"
            room = _SHARE * resources.memory_available() / self._peak_bytes(self._rows(longest[:1]))
            fitting = (d for d in divisors if d <= room)
        micro = next(fitting, None)
        steps = self.args.gradient_accumulation_steps * (requested // (micro or 1))
        change = {"per_device_train_batch_size": micro or 1, "gradient_accumulation_steps": steps}
        self.keep(change)
        if micro is None and where != "the memory":
            raise JobError(
                "gpu_oom", f"one row of {lengths[longest[0]]} tokens does not fit {where}"
            )
        if micro != requested:
            key = "per_device_train_batch_size"
            why = f"{requested} of the longest rows do not fit {where}"
            self.emit("changed", what=key, to=micro or 1, why=why, **{"from": requested})
            for key, value in change.items():
                setattr(self.args, key, value)
            self._train_batch_size = self.args.train_batch_size

    def _rows(self, numbers: Sequence[int]) -> list[Columns]:
        return [dict(self.train_dataset[number]) for number in numbers]

    def _peak_bytes(self, rows: list[Columns]) -> int:
        """Return the peak memory, in bytes, of a pass over these rows."""
        return max(1, resources.growth_during(lambda: self._fits(rows)))

    def _fits(self, rows: list[Columns]) -> bool:
        """Whether forward and backward of these rows fit; keeps no gradients and no memory."""
        inputs = self.data_collator(rows)
        if self.packs:
            inputs = self._with_mask(self._pack(inputs))
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
