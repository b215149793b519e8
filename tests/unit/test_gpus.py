"""Which GPUs a training takes, from the option to the worker's environment."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.schema import GpuChoice, RunRequest
from tunesmith.job.supervisor.preparation import worker_environment
from tunesmith.job.training import phase
from tunesmith.plan.gpus import gpus_of, rows_of_a_step


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("2", GpuChoice(2)),
        ("0,3", GpuChoice(2, (0, 3))),
        ("3,", GpuChoice(1, (3,))),
        (" 1, 2 ", GpuChoice(2, (1, 2))),
    ],
)
def test_a_number_is_how_many_and_a_comma_is_which(text: str, expected: GpuChoice | None) -> None:
    assert gpus_of(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "two", "1,x", "1,1", ",", "1,,2", "1.5", "all"])
def test_anything_else_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UsageError, match="expected how many") as refused:
        gpus_of(text)
    assert refused.value.message.startswith(f"--gpus {text}:")


def test_a_plan_says_how_many_rows_a_step_has() -> None:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    two = GpuChoice(2, (0, 3))
    assert rows_of_a_step(values, two, keep_batch=False) == (
        "2 GPUs (numbers 0, 3) x 4 rows x 2 accumulated = 16 rows a step"
    )
    assert rows_of_a_step(values, two, keep_batch=True).endswith(
        "x 4 rows x 1 accumulated = 8 rows a step"
    )
    with pytest.raises(UsageError, match="2 cannot be shared by 3 GPUs") as refused:
        rows_of_a_step(values, GpuChoice(3), keep_batch=True)
    assert "`gradient_accumulation_steps=3` can be" in (refused.value.hint or "")
    # The remedy, followed.
    rows_of_a_step({**values, "gradient_accumulation_steps": 3}, GpuChoice(3), keep_batch=True)


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, GpuChoice(2), "0,1"),
        (None, GpuChoice(2, (0, 3)), "0,3"),
        # On a host that gives us some of its GPUs, ours are counted.
        ("GPU-a,GPU-b,GPU-c", GpuChoice(2), "GPU-a,GPU-b"),
        ("4,5,6", GpuChoice(1, (2,)), "6"),
        # The one that is not there is missed when they are counted.
        ("4,5", GpuChoice(2, (1, 2)), "5"),
    ],
)
def test_the_worker_sees_the_chosen_ones_alone(
    visible: str | None, gpus: GpuChoice, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = worker_environment(RunRequest(gpus=gpus))
    assert found["CUDA_VISIBLE_DEVICES"] == expected
    assert found["NPROC_PER_NODE"] == str(gpus.count)


def test_processes_share_the_rows_that_one_would_have() -> None:
    [change] = phase._share_batch({"gradient_accumulation_steps": 8}, 4)
    assert (change.key, change.value, change.was) == ("gradient_accumulation_steps", 2, 8)
    with pytest.raises(JobError, match="6 cannot be shared by 4 processes"):
        phase._share_batch({"gradient_accumulation_steps": 6}, 4)
