"""The training curve of a run, read from the records of its events.jsonl. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tunesmith.job.run import events

SMOOTH_POINTS = 600  # more than a picture 900 px wide can show; keeps smoothing linear in time
SMOOTH_SHARE = 0.12  # half window of the smoothing, as a share of all points
DESPIKE_WINDOW = 2  # points on either side: a running median of 5 takes out single outliers


@dataclass(frozen=True, slots=True)
class TrainPoint:
    """One logged training step. `loss` is nat/token; NaN or infinite where it was so."""

    step: int
    loss: float
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    epoch: float | None


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """The validation loss at a step, in nat/token."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved checkpoint; size in bytes and time in seconds if they were logged."""

    step: int
    bytes: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Resume:
    """A restart from a checkpoint. `lost` is the number of logged steps that were repeated."""

    step: int
    checkpoint: str
    lost: int


@dataclass(frozen=True, slots=True)
class Curve:
    """The course of a training; each tuple is sorted by step and contains each step once."""

    train: tuple[TrainPoint, ...]
    evals: tuple[EvalPoint, ...]
    checkpoints: tuple[Checkpoint, ...]
    resumes: tuple[Resume, ...]
    total_steps: int | None

    @property
    def finite(self) -> tuple[TrainPoint, ...]:
        """The training points with a finite loss."""
        return tuple(point for point in self.train if math.isfinite(point.loss))

    @property
    def last_step(self) -> int:
        """The last logged step, 0 if none was logged."""
        return self.train[-1].step if self.train else 0


def read_curve(found: Iterable[events.Event]) -> Curve:
    """Build the curve from events in the order in which they were written.

    After a restart steps repeat. Everything that an abandoned attempt logged at or after the
    repeated step is dropped, so the last record of a step wins and no point of a lost attempt
    remains after the run's current step.
    """
    train: dict[int, TrainPoint] = {}
    evals: dict[int, EvalPoint] = {}
    checkpoints: dict[int, Checkpoint] = {}
    resumes: list[Resume] = []
    total: int | None = None
    newest = 0
    for event in found:
        if isinstance(event, events.Log):
            _rewind(train, event.step)
            train[event.step] = _train_point(event)
            total = event.total_steps or total
            newest = event.step
        elif isinstance(event, events.Evaluated):
            _rewind(evals, event.step)
            evals[event.step] = EvalPoint(event.step, _loss(event.loss))
        elif isinstance(event, events.Checkpoint):
            _rewind(checkpoints, event.step)
            checkpoints[event.step] = Checkpoint(event.step, event.bytes, event.seconds)
        elif isinstance(event, events.Resumed):
            for series in (train, evals, checkpoints):
                _rewind(series, event.step + 1)
            lost = max(0, newest - event.step)
            resumes.append(Resume(event.step, event.checkpoint or "", lost))
            newest = event.step
    return Curve(
        train=tuple(train.values()),
        evals=tuple(evals.values()),
        checkpoints=tuple(checkpoints.values()),
        resumes=tuple(resumes),
        total_steps=total,
    )


def smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return steps and values of the trend: equal lengths, at most SMOOTH_POINTS, no lag.

    A running median removes single outliers, then a straight line is fitted around
    each point with tricube weights (Cleveland, LOWESS 1979). Unlike a moving average this
    does not flatten the first steep steps or lag behind the last ones. Values are finite.
    """
    xs, ys = _condensed(steps, values)
    count = len(ys)
    if count < 5:
        return xs, ys
    quiet = [ys[0], *(_median_around(ys, at) for at in range(1, count - 1)), ys[-1]]
    half = max(2, round(count * SMOOTH_SHARE))
    return xs, [_local_line(xs, quiet, at, half) for at in range(count)]


def _rewind(series: dict[int, Any], step: int) -> None:
    """Drop what was recorded at `step` or later; keeps the dict sorted by step."""
    while series and next(reversed(series)) >= step:
        series.popitem()


def _train_point(event: events.Log) -> TrainPoint:
    return TrainPoint(
        step=event.step,
        loss=_loss(event.loss),
        learning_rate=_number(event.learning_rate),
        grad_norm=_number(event.grad_norm),
        tokens_per_second=_number(event.tokens_per_second),
        epoch=_number(event.epoch),
    )


def _loss(value: float | str | None) -> float:
    """A loss that JSON could not hold (null, "nan") is not a number, not a missing point."""
    number = _number(value)
    return math.nan if number is None else number


def _number(value: float | str | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _condensed(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average neighbours into equal blocks where there are more than SMOOTH_POINTS."""
    block = -(-len(values) // SMOOTH_POINTS) if values else 1
    xs, ys = [], []
    for start in range(0, len(values), block):
        xs.append(sum(steps[start : start + block]) / len(steps[start : start + block]))
        ys.append(sum(values[start : start + block]) / len(values[start : start + block]))
    return xs, ys


def _median_around(values: Sequence[float], at: int) -> float:
    reach = min(DESPIKE_WINDOW, at, len(values) - 1 - at)
    return median(values[at - reach : at + reach + 1])


def _local_line(xs: Sequence[float], ys: Sequence[float], at: int, half: int) -> float:
    """The value at `at` of the weighted least-squares line through its neighbours."""
    low, high = max(0, at - half), min(len(ys), at + half + 1)
    reach = max(abs(xs[low] - xs[at]), abs(xs[high - 1] - xs[at])) * 1.0001 or 1.0
    weight_sum = x_sum = y_sum = xx_sum = xy_sum = 0.0
    for near in range(low, high):
        x = xs[near] - xs[at]
        weight = (1 - (abs(x) / reach) ** 3) ** 3
        weight_sum += weight
        x_sum += weight * x
        y_sum += weight * ys[near]
        xx_sum += weight * x * x
        xy_sum += weight * x * ys[near]
    spread = weight_sum * xx_sum - x_sum * x_sum
    if spread <= 0:
        return ys[at]
    return (y_sum * xx_sum - xy_sum * x_sum) / spread
