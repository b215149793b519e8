"""The curve is what the run has behind it, also after restarts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tunesmith.job.run.codec import decode
from tunesmith.job.run.events import Event
from tunesmith.report import curve as report_curve
from tunesmith.report.curve import Curve, smoothed

pytestmark = pytest.mark.unit


def log(step: int, loss: object, **fields: Any) -> dict[str, Any]:
    return {"event": "log", "step": step, "total_steps": 10, "loss": loss, **fields}


def read_curve(lines: list[dict[str, Any]]) -> Curve:
    return report_curve.read_curve([decode(Event, line) for line in lines])


def losses(curve: Curve) -> dict[int, float]:
    return {point.step: point.loss for point in curve.train}


def test_reads_every_series() -> None:
    curve = read_curve(
        [
            {"event": "run_started", "phases": ["train"]},
            log(1, 3.0, learning_rate=1e-4, grad_norm=1.5, tokens_per_second=90, epoch=0.1),
            {"event": "eval", "step": 1, "loss": 3.2},
            {"event": "checkpoint", "step": 1, "path": "p", "bytes": 100, "seconds": 0.5},
            {"event": "progress", "phase": "after", "done": 1, "total": 2, "unit": "rows"},
        ]
    )

    (point,) = curve.train
    assert (point.loss, point.learning_rate, point.grad_norm) == (3.0, 1e-4, 1.5)
    assert (point.tokens_per_second, point.epoch, curve.total_steps) == (90, 0.1, 10)
    assert [(e.step, e.loss) for e in curve.evals] == [(1, 3.2)]
    assert [(c.step, c.bytes, c.seconds) for c in curve.checkpoints] == [(1, 100, 0.5)]
    assert curve.resumes == ()


def test_last_record_of_a_step_wins_after_a_resume() -> None:
    first = [log(step, 3.0) for step in (1, 2, 3, 4)]
    again = [log(step, 2.0) for step in (3, 4, 5)]
    curve = read_curve([*first, {"event": "resumed", "step": 2, "checkpoint": "c-2"}, *again])

    assert losses(curve) == {1: 3.0, 2: 3.0, 3: 2.0, 4: 2.0, 5: 2.0}
    assert [(r.step, r.checkpoint, r.lost) for r in curve.resumes] == [(2, "c-2", 2)]


def test_a_resume_drops_what_was_lost_even_before_it_is_done_again() -> None:
    events = [
        *(log(step, 3.0) for step in (1, 2, 3, 4)),
        {"event": "eval", "step": 4, "loss": 3.0},
        {"event": "checkpoint", "step": 4, "bytes": 1, "seconds": 1},
        {"event": "resumed", "step": 2, "checkpoint": "c-2"},
    ]
    curve = read_curve(events)

    assert sorted(losses(curve)) == [1, 2]
    assert curve.evals == ()
    assert curve.checkpoints == ()


def test_a_fresh_start_without_a_checkpoint_forgets_the_old_attempt() -> None:
    curve = read_curve([log(1, 3.0), log(2, 2.9), log(3, 2.8), log(1, 4.0)])

    assert losses(curve) == {1: 4.0}


@pytest.mark.parametrize("written", [None, "nan", math.nan, "NaN"])
def test_a_loss_json_cannot_hold_is_nan_and_not_lost(written: object) -> None:
    curve = read_curve([log(1, 2.0), log(2, written)])

    assert math.isnan(losses(curve)[2])
    assert [point.step for point in curve.finite] == [1]


def test_smoothing_keeps_a_straight_line_and_its_ends() -> None:
    steps = list(range(1, 41))
    values = [5 - 0.1 * step for step in steps]
    xs, ys = smoothed(steps, values)

    assert xs == steps
    assert ys == pytest.approx(values)


def test_smoothing_ignores_a_single_outlier() -> None:
    values = [2.0] * 40
    values[20] = 50.0

    assert max(smoothed(list(range(40)), values)[1]) == pytest.approx(2.0)


def test_smoothing_shortens_a_long_run() -> None:
    steps = list(range(100_000))
    xs, ys = smoothed(steps, [1.0] * len(steps))

    assert len(xs) == len(ys) <= 600


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_smoothing_takes_any_length(count: int) -> None:
    xs, ys = smoothed(list(range(count)), [1.0] * count)

    assert len(xs) == len(ys) == count
