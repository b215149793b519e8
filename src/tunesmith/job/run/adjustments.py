"""A run's config with what was changed after a failure: adjustments.json, kept over restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.core.files import locked, write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import Adjustments
from tunesmith.job.system import disk


def adjusted_config(run: RunFolder) -> dict[str, Any]:
    """Return the config as the next attempt runs it."""
    return run.settled(run.config() | encode(run.adjustments()))


def step_down(run: RunFolder, emit: Callable[..., None]) -> bool:
    """After a GPU OOM lower what a step needs; False when nothing is left to lower.

    The micro-batch shrinks and the accumulation grows by the same factor, so the
    effective batch stays; at 1, gradient checkpointing is turned on.
    """
    config = adjusted_config(run)
    batch = int(config.get("per_device_train_batch_size", 8))
    accumulation = int(config.get("gradient_accumulation_steps", 1))
    if batch > 1:
        # Halves even sizes; an odd one goes to its next divisor, which keeps the product.
        smaller = max(d for d in range(1, batch // 2 + 1) if batch % d == 0)
        change = Adjustments(
            per_device_train_batch_size=smaller,
            gradient_accumulation_steps=accumulation * (batch // smaller),
        )
    elif config.get("disable_gradient_checkpointing"):
        change = Adjustments(disable_gradient_checkpointing=False)
    else:
        return False
    with locked(run.adjustments_file):
        write_json(run.adjustments_file, encode(run.adjustments()) | encode(change))
    for key, value in encode(change).items():
        before = {"from": config.get(key)}
        emit("changed", what=key, to=value, why="GPU out of memory", **before)
    return True


def refusal(run: RunFolder) -> OSError | None:
    """Return why the disks of a run and of its results take nothing; None when they do."""
    places = [run.path]
    try:
        config = adjusted_config(run) if run.config_file.exists() else {}
        if output := config.get("output_dir"):
            places.append(Path(output))
        return next((found for place in places if (found := disk.refusal(place))), None)
    except OSError as error:
        if not disk.refused(error):
            raise
        return error
