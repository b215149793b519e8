"""The GPUs that a training takes, and the rows that a step has on them."""

from __future__ import annotations

from tunesmith.core import documents
from tunesmith.core.errors import UsageError
from tunesmith.job.run.schema import GpuChoice

# LLaMA-Factory's own, where a config says nothing (transformers, TrainingArguments).
_ROWS = 8


def gpus_of(text: str) -> GpuChoice | None:
    """Return the GPUs as typed: a number is how many, numbers with commas are which; None for
    nothing. Raises UsageError for anything else."""
    if not text:
        return None
    words = [word.strip() for word in text.split(",")]
    named = "," in text
    ids = [int(word) for word in words if word.isdecimal()]
    if named and words[-1] == "":
        words.pop()
    twice = len(set(ids)) != len(ids)
    if len(ids) != len(words) or twice or (not named and ids[0] < 1):
        raise UsageError(
            f"--gpus {text}: expected how many, as in 2, or which, as in 0,3",
            hint="`--gpus 1` takes one; `--gpus 3,` takes the one numbered 3",
        )
    return GpuChoice(len(ids), tuple(ids)) if named else GpuChoice(ids[0])


def rows_of_a_step(values: documents.Config, gpus: GpuChoice, *, keep_batch: bool) -> str:
    """Return in words how many rows a step has on the chosen GPUs.

    Raises UsageError where `keep_batch` cannot be.
    """
    rows = int(values.get("per_device_train_batch_size") or _ROWS)
    steps = int(values.get("gradient_accumulation_steps") or 1)
    count = gpus.count
    if keep_batch:
        if steps % count:
            raise UsageError(
                f"--keep-batch: gradient_accumulation_steps {steps} cannot be shared by "
                f"{count} GPUs",
                hint=f"`gradient_accumulation_steps={count * -(-steps // count)}` can be, or "
                "leave --keep-batch out",
            )
        steps //= count
    which = f" (numbers {', '.join(map(str, gpus.ids))})" if gpus.ids else ""
    return (
        f"{count} GPU{'s' if count > 1 else ''}{which} x {rows} rows x {steps} accumulated = "
        f"{count * rows * steps} rows a step"
    )
