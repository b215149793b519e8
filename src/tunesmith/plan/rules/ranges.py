"""Numbers that LLaMA-Factory 0.9.3 takes and that cannot work, by key.

Its parser asks for a type only (warmup_ratio and a few others apart): `num_train_epochs: 0` ends
well after no step, `max_samples: 0` as `StopIteration`, `lora_rank: 0` after the model was loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.plan.rules.fault import REMOVE, Fault
from tunesmith.plan.rules.settings import Settings


@dataclass(frozen=True)
class Range:
    """The numbers a key may have: low <= value <= high, or < where the end is `open`."""

    key: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    # What happens otherwise, where the bounds alone do not say it.
    why: str = ""
    # A value that works for anybody; None: the key is to be removed.
    usual: object = None

    def holds(self, value: float) -> bool:
        """Whether a number lies inside."""
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    @property
    def text(self) -> str:
        """The range in words."""
        low = f"{'greater than' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'less than' if self.open_high else 'at most'} {self.high:g}"
        bounds = [low] * math.isfinite(self.low) + [high] * math.isfinite(self.high)
        return " and ".join(bounds)


def _positive(key: str, usual: object = None, why: str = "") -> Range:
    return Range(key, 0, open_low=True, usual=usual, why=why)


def _counted(key: str, usual: object = None, why: str = "") -> Range:
    return Range(key, 1, usual=usual, why=why)


def _share(key: str, usual: object = None, why: str = "") -> Range:
    return Range(key, 0, 1, open_high=True, usual=usual, why=why)


RANGES = (
    # data
    Range("cutoff_len", 2, usual=2048, why="a row needs two tokens for one prediction"),
    _counted("max_samples"),
    _counted("preprocessing_num_workers"),
    _counted("buffer_size"),
    Range("val_size", 0),
    _counted("eval_num_beams"),
    # length of the training
    _positive("learning_rate", 5e-5, "nothing would be learnt"),
    Range("warmup_ratio", 0, 1, usual=0.1),
    Range("warmup_steps", 0),
    _positive("num_train_epochs", 3.0, "there would be no step"),
    # batch
    _counted("per_device_train_batch_size", 1),
    _counted("per_device_eval_batch_size", 1),
    _counted("gradient_accumulation_steps", 1),
    _counted("eval_accumulation_steps"),
    Range("dataloader_num_workers", 0),
    _counted("dataloader_prefetch_factor"),
    # optimizer
    Range("weight_decay", 0),
    _share("adam_beta1"),
    _share("adam_beta2"),
    _positive("adam_epsilon"),
    _share("label_smoothing_factor"),
    Range("neftune_noise_alpha", 0),
    Range("seed", 0, 2**32 - 1, usual=42, why="NumPy takes no other seed"),
    Range("data_seed", 0, 2**32 - 1, why="NumPy takes no other seed"),
    # what is kept, logged and evaluated
    _positive("save_steps", 500, "no checkpoint would be made, and a stop would lose everything"),
    _positive("logging_steps", 10, "no loss would be seen"),
    _positive("eval_steps"),
    Range("eval_delay", 0),
    _counted("save_total_limit", why="0 and less keep every checkpoint, until the disk is full"),
    _counted("early_stopping_steps"),
    _positive("ddp_timeout"),
    # adapters
    _counted("lora_rank", 8),
    _counted("lora_alpha", why="0 would be read as lora_rank * 2"),
    _share("lora_dropout", 0.0),
    _positive("loraplus_lr_ratio"),
    _positive("loraplus_lr_embedding"),
    # other methods
    _counted("galore_rank"),
    _counted("galore_update_interval"),
    _positive("galore_scale"),
    _counted("apollo_rank"),
    _counted("apollo_update_interval"),
    _positive("apollo_scale"),
    Range("badam_update_ratio", 0, 1, open_low=True),
    # stages
    _positive("pref_beta"),
    Range("pref_ftx", 0),
    Range("dpo_label_smoothing", 0, 0.5, open_high=True),
    Range("simpo_gamma", 0),
    _positive("kto_chosen_weight"),
    _positive("kto_rejected_weight"),
    _counted("ppo_buffer_size"),
    _counted("ppo_epochs"),
    _positive("ppo_target"),
    # answers
    Range("temperature", 0, why="0 is greedy decoding"),
    Range("top_p", 0, 1, open_low=True),
    Range("top_k", 0),
    _counted("num_beams"),
    _counted("max_new_tokens"),
    _positive("repetition_penalty"),
    _counted("generation_max_length"),
    _counted("generation_num_beams"),
    # pictures
    _counted("image_max_pixels"),
    _counted("image_min_pixels"),
    _counted("video_max_pixels"),
    _counted("video_min_pixels"),
    _counted("video_maxlen"),
    _positive("video_fps"),
    _counted("audio_sampling_rate"),
    # export
    _counted("export_size"),
)
# Keys whose number counts only as long as another one does not stand in its place.
_UNUSED = {
    "num_train_epochs": lambda s: s.number("max_steps") > 0,
    "save_steps": lambda s: s.get("save_strategy") != "steps",
    "eval_steps": lambda s: s.get("eval_strategy") != "steps",
    "logging_steps": lambda s: s.get("logging_strategy") != "steps",
}


def faults(settings: Settings) -> Iterator[Fault]:
    """Yield a fault for each number that a config gives and that cannot work."""
    for bounds in RANGES:
        value = settings.values.get(bounds.key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        unused = _UNUSED.get(bounds.key)
        if bounds.holds(value) or (unused and unused(settings)):
            continue
        why = f": {bounds.why}" if bounds.why else ""
        yield Fault(
            bounds.key,
            f"`{bounds.key}` is {value:g}, but must be {bounds.text}{why}",
            {bounds.key: REMOVE if bounds.usual is None else bounds.usual},
        )
    yield from _wholes(settings)
    yield from _steps(settings)


def _wholes(settings: Settings) -> Iterator[Fault]:
    """Numbers that are a share below 1 and a count above."""
    size = settings.values.get("val_size")
    if isinstance(size, float) and size >= 1 and (size == 1.0 or not size.is_integer()):
        yield Fault(
            "val_size",
            f"`val_size` is {size:g}: a share is less than 1, a number of rows is whole",
            {"val_size": 0.1},
        )
    for key in ("save_steps", "eval_steps", "logging_steps"):
        value = settings.values.get(key)
        if isinstance(value, float) and value > 1 and not value.is_integer():
            yield Fault(
                key,
                f"`{key}` is {value:g}: a share of all steps is less than 1, a number is whole",
                {key: round(value)},
            )


def _steps(settings: Settings) -> Iterator[Fault]:
    steps = settings.values.get("max_steps")
    if isinstance(steps, int) and (steps == 0 or steps < -1):
        yield Fault(
            "max_steps",
            f"`max_steps` is {steps}: it is the number of steps, or -1 for whole epochs",
            {"max_steps": -1},
        )
    warmup = settings.number("warmup_steps")
    if settings.number("max_steps") > 0 and warmup >= settings.number("max_steps"):
        yield Fault(
            "warmup_steps",
            f"`warmup_steps` is {warmup:g} of {settings.number('max_steps'):g} steps: "
            "the learning rate would never be reached",
            {"warmup_steps": int(settings.number("max_steps")) // 10},
        )
    if settings.values.get("freeze_trainable_layers") == 0 and settings.method == "freeze":
        yield Fault(
            "freeze_trainable_layers",
            "`freeze_trainable_layers` is 0: no layer would be trained",
            {"freeze_trainable_layers": 2},
        )
    bits = settings.values.get("quantization_bit")
    if bits is not None and bits not in (4, 8):
        yield Fault(
            "quantization_bit",
            f"`quantization_bit` is {bits}: bitsandbytes quantises to 4 or 8 bits",
            {"quantization_bit": 4},
        )
