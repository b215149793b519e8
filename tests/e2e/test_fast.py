"""The fast preset computes the same steps: losses, adapters, resumes, and its guard.

What one step computes: tests/training/test_fast_steps.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import STANDINS, Job
from tunesmith.core.files import write_json
from tunesmith.job.system.resources import multiplies_bf16

pytestmark = pytest.mark.e2e

# Dropout would draw other numbers for rows in another order.
PLAIN = {"lora_dropout": 0.0, "max_steps": 12, "save_steps": 6, "warmup_ratio": 0.0}
SMALL = PLAIN | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
WHOLE = PLAIN | {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "disable_gradient_checkpointing": True,
}


@pytest.fixture(scope="session")
def padded(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, tiny_model: Path, data: Path
) -> Job:
    """A training as LLaMA-Factory does it: one row after the other, checkpointing on."""
    made = Job(training_python, tmp_path_factory.mktemp("runs") / "padded")
    made.make(tiny_model, data, **SMALL)
    made.call("start")
    made.wait_for_end("succeeded")
    return made


def test_the_same_steps_as_padded_rows(job: Job, padded: Job, tiny_model: Path, data: Path) -> None:
    job.make(tiny_model, data, preset="fast", **WHOLE)
    job.call("start")
    job.wait_for_end("succeeded")
    assert job.events("changed") == []
    losses = job.losses()
    assert losses.keys() == padded.losses().keys()
    assert max(abs(losses[step] - padded.losses()[step]) for step in losses) < 2e-4
    assert losses[12] < losses[1] - 0.03, "it learns"
    # Its rows are laid end to end: no more tokens, padding included, than rows one by one.
    seen = json.loads((job.folder.output / "trainer_state.json").read_text())
    theirs = json.loads((padded.folder.output / "trainer_state.json").read_text())
    assert 0 < seen["num_input_tokens_seen"] <= theirs["num_input_tokens_seen"]
    assert seen["global_step"] == theirs["global_step"] == 12


def test_a_smaller_micro_batch_after_a_checkpoint_keeps_the_step(
    job: Job, padded: Job, tiny_model: Path, data: Path
) -> None:
    """What the supervisor does after a GPU ran out of memory in the middle of a training."""
    job.make(tiny_model, data, preset="fast", **WHOLE)
    job.call("start")
    job.wait(lambda: job.step() >= 7, "a checkpoint")
    job.call("stop")
    job.wait(lambda: not job.folder.busy(), "the stop", 60)
    change = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    write_json(job.folder.adjustments_file, change)
    job.call("start")
    job.wait_for_end("succeeded")
    losses = job.losses()
    assert max(abs(losses[step] - padded.losses()[step]) for step in losses) < 2e-4


def test_bf16_stays_where_the_processor_multiplies_it(
    job: Job, padded: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, preset="fast", **WHOLE, bf16=True)
    job.call("start")
    job.wait_for_end("succeeded")
    told = [(event["what"], event["to"]) for event in job.events("changed")]
    assert told == [("use_cpu", True) if multiplies_bf16() else ("bf16", False)]
    losses, expected = job.losses(), padded.losses()
    assert max(abs(losses[step] - expected[step]) / expected[step] for step in losses) < 0.01
    rounded = any(abs(losses[step] - expected[step]) > 2e-4 for step in losses)
    assert rounded == multiplies_bf16()


def test_rows_that_see_one_another_are_noticed(job: Job, tiny_model: Path, data: Path) -> None:
    """The guard's check: with a mask that does not keep rows apart it pads as ever."""
    job.make(
        tiny_model,
        data,
        preset="fast",
        standin=STANDINS / "leaking_mask.py",
        **WHOLE,
    )
    job.call("start")
    job.wait_for_end("succeeded")
    (told,) = job.events("changed")
    assert told["what"] == "packed rows"
    assert "the first rows' logits would differ by" in told["why"]


def test_a_micro_batch_that_memory_does_not_hold_is_lowered(
    job: Job, padded: Job, tiny_model: Path, data: Path
) -> None:
    job.make(tiny_model, data, preset="fast", standin=STANDINS / "little_memory.py", **WHOLE)
    job.call("start")
    job.wait_for_end("succeeded")
    (told,) = job.events("changed")
    assert (told["what"], told["from"], told["to"]) == ("per_device_train_batch_size", 8, 1)
    losses = job.losses()
    assert max(abs(losses[step] - padded.losses()[step]) for step in losses) < 2e-4
    kept = json.loads(job.folder.adjustments_file.read_text())
    assert kept == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
