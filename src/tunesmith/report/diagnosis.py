"""Diagnosis of a curve: statements with the values they are based on. Pure.

Every rule checks one aspect and returns findings or nothing. The texts are in
`tunesmith.report.i18n`, so a rule contains only thresholds and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from tunesmith.job.run.schema import RunRequest
from tunesmith.report.curve import SMOOTH_SHARE, Curve, smoothed
from tunesmith.report.i18n import advice_text

Level = Literal["info", "warning"]
Value = float | int | str
Series = Sequence[float]

MIN_POINTS = 8  # fewer points have no shape: a third would hold two of them
STILL_FALLING_SHARE = 0.12  # an exponential has this much left in its last third after 2.5 tau
STILL_FALLING_LEVEL = 0.03  # a fall of 3 % of the loss itself is the least that is worth a run
SLOW_FALL = 0.10  # LoRA at a fitting rate takes more than a tenth off the loss in one run
NOISE_TIMES = 3.0  # a fall must be this many standard errors of the noise to be called one
RISING_SHARE = 0.25  # the loss gave back a quarter of what it had won: it diverges, not wobbles
OVERFIT_RISE = 0.03  # validation losses of one model differ by 1-2 % between small splits
SPIKE_MADS = 6.0  # Gaussian noise passes six robust sigmas once in 10^9 points
SPIKE_SHARE = 0.30  # and it must stand out by 30 %: a very smooth curve has almost no sigma
SPIKE_REACH = 5  # neighbours on each side a spike is compared with
SPIKES_MANY = 2  # one spike is mostly one odd batch; a second one is a pattern,
SPIKES_RARE = 200  # unless they are rarer than one in so many points
FEW_STEPS = 30  # with warmup, fewer optimizer steps leave the rate no time to work
FEW_ROWS = 50  # a tenth held out of fewer rows is under five answers: its loss is luck
MEMORISED_LOSS = 0.05  # exp(0.05): each token right with 95 %, which free text never is
FORGOTTEN = 0.10  # a healthy run hardly moves the loss on general prompts (the demo: +0.3 %)
FEWER_RIGHT = 2  # one answer of a dozen is luck
ZERO_GRADIENT_SHARE = 0.9  # a step may be 0 by chance (all of the answer cut off), not nine of ten
LARGER_RATE = 3.0  # half a decade: large enough to see, small enough not to diverge
LONGER = 5 / 3  # as much again as the last two thirds took

_EXPLAINS = (
    ("overfit", "still_falling"),
    ("gradient_zero", "flat"),
    ("gradient_zero", "memorised"),
    ("gradient_nan", "memorised"),
    ("few_steps", "slow"),
    ("few_steps", "flat"),
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Inputs of the diagnosis besides the curve. None: unknown.

    Losses of the held-out rows and of the guard set are nat/token, before and after training.
    `finished`: the training reached its regular end; only then does the end of the curve have a
    meaning.
    """

    finished: bool
    rows: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    max_grad_norm: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    guard_before: float | None = None
    guard_after: float | None = None
    guard_right: tuple[int, int, int] | None = None  # before, after, of


@dataclass(frozen=True, slots=True)
class Advice:
    """One statement. `change` contains suggested config values, empty if none are needed."""

    code: str
    level: Level
    text: str
    figures: dict[str, Value]
    change: dict[str, Value]


@dataclass(frozen=True, slots=True)
class _Finding:
    code: str
    level: Level
    figures: dict[str, Value]
    change: dict[str, Value]


@dataclass(frozen=True, slots=True)
class _Shape:
    """The finite losses, their trend, and the noise around it (standard deviation)."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    trend_steps: list[float]
    trend: list[float]
    noise: float

    @property
    def fall(self) -> float:
        return self.trend[0] - self.trend[-1]

    @property
    def end_error(self) -> float:
        """How far noise alone can move an end of the trend.

        A weighted line is loose at its end: its variance there is six times that of a mean.
        """
        held = max(1.0, len(self.losses) * SMOOTH_SHARE / 6)
        return NOISE_TIMES * self.noise / math.sqrt(held)

    @property
    def tail_error(self) -> float:
        """The same for the fall over the last third: sqrt(12/n) is that of a line's fall."""
        return NOISE_TIMES * self.noise * math.sqrt(12 / (len(self.losses) / 3))

    def last_third(self) -> tuple[Series, Series]:
        start = len(self.trend) * 2 // 3
        return self.trend_steps[start:], self.trend[start:]


def diagnose(curve: Curve, facts: RunFacts, language: str = "en") -> tuple[Advice, ...]:
    """Return the statements about a curve, warnings first; never empty."""
    shape = _shape_of(curve)
    findings = [*_not_finite(curve, facts), *_zero_gradient(curve), *_small_data(curve, facts)]
    if shape is None:
        findings.append(_too_few_points(curve))
    else:
        findings += [*_spikes(shape, facts), *_trend(shape, facts), *_overfit(curve, shape, facts)]
    findings += [*_no_gain(facts), *_forgetting(facts)]
    codes = {finding.code for finding in findings}
    # A symptom explained by one fault is not reported again as another.
    hidden = {code for cause, code in _EXPLAINS if cause in codes}
    findings = [finding for finding in findings if finding.code not in hidden]
    if shape and codes <= {"few_rows", "few_steps", "few_spikes", "forgetting", "fewer_right"}:
        findings.append(_healthy(curve, shape))
    findings.sort(key=lambda finding: finding.level != "warning")
    return tuple(
        Advice(
            code=finding.code,
            level=finding.level,
            text=advice_text(finding.code, finding.figures, language),
            figures=finding.figures,
            change=finding.change,
        )
        for finding in findings
    )


def facts_of(
    run: RunRequest,
    config: Mapping[str, Any],
    phases: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> RunFacts:
    """Gather the facts from run.json, config.yaml, status.json's phases and evaluation.json."""
    rows = [item.rows for item in run.data if item.rows is not None]

    def measured(when: str, *, guard: bool = False) -> float | None:
        entry = evaluation.get(when) or {}
        loss = ((entry.get("guard") or {}) if guard else entry).get("loss")
        return float(loss) if isinstance(loss, int | float) else None

    return RunFacts(
        finished=phases.get("train") == "succeeded",
        rows=sum(rows) if rows else None,
        epochs=_float(config.get("num_train_epochs")),
        learning_rate=_float(config.get("learning_rate")),
        max_grad_norm=_float(config.get("max_grad_norm")),
        held_out_before=measured("before"),
        held_out_after=measured("after"),
        guard_before=measured("before", guard=True),
        guard_after=measured("after", guard=True),
        guard_right=_guard_right(evaluation),
    )


def _guard_right(evaluation: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the right answers before and after, and their number, if both were evaluated."""
    judged = [
        ((evaluation.get(when) or {}).get("guard") or {}).get("expected")
        for when in ("before", "after")
    ]
    if not judged[0] or not judged[1]:
        return None
    return int(judged[0]["met"]), int(judged[1]["met"]), int(judged[1]["of"])


def _shape_of(curve: Curve) -> _Shape | None:
    points = curve.finite
    if len(points) < MIN_POINTS:
        return None
    steps, losses = [p.step for p in points], [p.loss for p in points]
    trend_steps, trend = smoothed(steps, losses)
    # Second differences see noise and hardly any trend; sqrt(6) is their gain on white noise.
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    noise = 1.4826 * median(bends) / math.sqrt(6)
    return _Shape(tuple(steps), tuple(losses), trend_steps, trend, noise)


def _not_finite(curve: Curve, facts: RunFacts) -> list[_Finding]:
    bad = [point for point in curve.train if not math.isfinite(point.loss)]
    odd = [p for p in curve.train if p.grad_norm is not None and not math.isfinite(p.grad_norm)]
    if bad:
        figures: dict[str, Value] = {"count": len(bad), "step": bad[0].step}
        return [_Finding("not_finite", "warning", figures, _gentler(facts))]
    if odd:
        # Seen with LLaMA-Factory 0.9.3 and some SDPA kernels (its issue 8088).
        figures = {"count": len(odd), "step": odd[0].step}
        return [_Finding("gradient_nan", "warning", figures, {"flash_attn": "disabled"})]
    return []


def _zero_gradient(curve: Curve) -> list[_Finding]:
    norms = [point.grad_norm for point in curve.train if point.grad_norm is not None]
    zeros = sum(norm == 0 for norm in norms)
    if not norms or zeros < ZERO_GRADIENT_SHARE * len(norms):
        return []
    return [_Finding("gradient_zero", "warning", {"zeros": zeros, "of": len(norms)}, {})]


def _small_data(curve: Curve, facts: RunFacts) -> list[_Finding]:
    found = []
    if facts.rows is not None and facts.rows < FEW_ROWS:
        found.append(_Finding("few_rows", "warning", {"rows": facts.rows, "needed": FEW_ROWS}, {}))
    steps = curve.total_steps or curve.last_step
    if 0 < steps < FEW_STEPS:
        change: dict[str, Value] = {}
        if facts.epochs:
            change["num_train_epochs"] = float(math.ceil(facts.epochs * FEW_STEPS / steps))
        found.append(
            _Finding("few_steps", "warning", {"steps": steps, "needed": FEW_STEPS}, change)
        )
    return found


def _too_few_points(curve: Curve) -> _Finding:
    figures: dict[str, Value] = {"points": len(curve.finite), "needed": MIN_POINTS}
    return _Finding("few_points", "info", figures, {"logging_steps": 1})


def _spikes(shape: _Shape, facts: RunFacts) -> list[_Finding]:
    """Losses that stand out above their neighbours before *and* after them.

    Comparing with both sides keeps the steep start of a clean curve from looking like one.
    """
    found = []
    losses = shape.losses
    # Where the loss is high its noise is mostly high too: the noise goes with the level.
    relative = shape.noise / (abs(median(losses)) or 1)
    for at in range(SPIKE_REACH, len(losses) - SPIKE_REACH):
        level = max(
            median(losses[at - SPIKE_REACH : at]), median(losses[at + 1 : at + 1 + SPIKE_REACH])
        )
        if losses[at] - level > max(
            SPIKE_MADS * max(shape.noise, relative * abs(level)), SPIKE_SHARE * abs(level)
        ):
            found.append((losses[at], shape.steps[at], level))
    if not found:
        return []
    loss, step, level = max(found)
    figures: dict[str, Value] = {"count": len(found), "step": step, "loss": loss, "level": level}
    if len(found) < max(SPIKES_MANY, len(losses) / SPIKES_RARE):
        return [_Finding("few_spikes", "info", figures, {})]
    return [_Finding("spikes", "warning", figures, _gentler(facts))]


def _trend(shape: _Shape, facts: RunFacts) -> list[_Finding]:
    """At most one statement about the course as a whole."""
    start, end = shape.trend[0], shape.trend[-1]
    figures: dict[str, Value] = {
        "start": start,
        "end": end,
        "share": shape.fall / (abs(start) or 1),
    }
    tail_steps, tail = shape.last_third()
    if max(tail) < MEMORISED_LOSS:
        trend = zip(shape.trend_steps, shape.trend, strict=True)
        step = next(step for step, loss in trend if loss < MEMORISED_LOSS)
        figures["limit"] = MEMORISED_LOSS
        return [_Finding("memorised", "warning", figures, _shorter(facts, step, shape))]
    least = min(shape.trend)
    if end - least > max(RISING_SHARE * (start - least), shape.end_error, SLOW_FALL * least):
        step = round(shape.trend_steps[shape.trend.index(least)])
        figures |= {"least": least, "step": step}
        return [_Finding("rising", "warning", figures, _gentler(facts))]
    falls = _falls_by_thirds(shape)
    if not falls and shape.fall < max(SLOW_FALL * start, shape.end_error * math.sqrt(2)):
        return [_Finding("flat", "warning", figures, _faster(facts))]
    if falls and shape.fall < SLOW_FALL * start:
        return [_Finding("slow", "warning", figures, _faster(facts))]
    if not facts.finished:
        return []
    tail_fall = -_slope(tail_steps, tail) * (tail_steps[-1] - tail_steps[0])
    tail_share = tail_fall / shape.fall
    if tail_share > STILL_FALLING_SHARE and tail_fall > max(
        shape.tail_error, STILL_FALLING_LEVEL * end
    ):
        figures |= {"tail_fall": tail_fall, "tail_share": tail_share}
        return [_Finding("still_falling", "info", figures, _longer(facts))]
    return []


def _overfit(curve: Curve, shape: _Shape, facts: RunFacts) -> list[_Finding]:
    """Validation rises after its minimum while the training loss goes on falling."""
    evals = [point for point in curve.evals if math.isfinite(point.loss)]
    if len(evals) < 3:
        return []
    best, last = min(evals, key=lambda point: point.loss), evals[-1]
    rise = last.loss / best.loss - 1 if best.loss > 0 else 0.0
    if best is last or rise < OVERFIT_RISE:
        return []
    near = min(range(len(shape.trend)), key=lambda at: abs(shape.trend_steps[at] - best.step))
    if shape.trend[-1] >= shape.trend[near]:
        return []
    figures: dict[str, Value] = {
        "step": best.step,
        "best": best.loss,
        "last_step": last.step,
        "last": last.loss,
        "rise": rise,
        "train_then": shape.trend[near],
        "train_last": shape.trend[-1],
    }
    return [_Finding("overfit", "warning", figures, _shorter(facts, best.step, shape))]


def _no_gain(facts: RunFacts) -> list[_Finding]:
    before, after = facts.held_out_before, facts.held_out_after
    if before is None or after is None or after < before:
        return []
    return [_Finding("no_gain", "warning", {"before": before, "after": after}, {})]


def _forgetting(facts: RunFacts) -> list[_Finding]:
    """General prompts got worse: gentler and shorter training keeps more of the base."""
    before, after = facts.guard_before, facts.guard_after
    if before is None or after is None or not before > 0 or after / before - 1 < FORGOTTEN:
        right = facts.guard_right
        if right is None or right[0] - right[1] < FEWER_RIGHT:
            return []
        counts: dict[str, Value] = {"before": right[0], "after": right[1], "of": right[2]}
        return [_Finding("fewer_right", "info", counts, {})]
    figures: dict[str, Value] = {"before": before, "after": after, "rise": after / before - 1}
    change: dict[str, Value] = {}
    if facts.learning_rate:
        change["learning_rate"] = _two_digits(facts.learning_rate / 2)
    if facts.epochs and facts.epochs > 1:
        change["num_train_epochs"] = float(max(1, math.floor(facts.epochs * 2 / 3)))
    return [_Finding("forgetting", "warning", figures, change)]


def _healthy(curve: Curve, shape: _Shape) -> _Finding:
    figures: dict[str, Value] = {
        "start": shape.trend[0],
        "end": shape.trend[-1],
        "share": shape.fall / (abs(shape.trend[0]) or 1),
        "points": len(curve.train),
    }
    return _Finding("healthy", "info", figures, {})


def _falls_by_thirds(shape: _Shape) -> bool:
    """Whether the last third lies below the first by more than the noise explains."""
    third = len(shape.losses) // 3
    fall = median(shape.losses[:third]) - median(shape.losses[-third:])
    return fall > NOISE_TIMES * shape.noise * math.sqrt(2 / third)


def _slope(xs: Series, ys: Series) -> float:
    """Theil-Sen: the median of the slopes of all pairs, so a few bad points do not turn it."""
    pairs = [(a, b) for a in range(len(xs)) for b in range(a + 1, len(xs))]
    return median((ys[b] - ys[a]) / (xs[b] - xs[a]) for a, b in pairs)


def _gentler(facts: RunFacts) -> dict[str, Value]:
    change: dict[str, Value] = {}
    if facts.learning_rate:
        change["learning_rate"] = _two_digits(facts.learning_rate / 2)
    # LLaMA-Factory takes 1.0 from transformers where the config names none.
    norm = 1.0 if facts.max_grad_norm is None else facts.max_grad_norm
    change["max_grad_norm"] = 1.0 if norm > 1 or norm <= 0 else _two_digits(norm / 2)
    return change


def _faster(facts: RunFacts) -> dict[str, Value]:
    if not facts.learning_rate:
        return {}
    return {"learning_rate": _two_digits(facts.learning_rate * LARGER_RATE)}


def _longer(facts: RunFacts) -> dict[str, Value]:
    if not facts.epochs:
        return {}
    return {"num_train_epochs": float(math.ceil(facts.epochs * LONGER))}


def _shorter(facts: RunFacts, step: float, shape: _Shape) -> dict[str, Value]:
    """The number of epochs that ends at `step`, in tenths."""
    if not facts.epochs:
        return {}
    return {"num_train_epochs": max(0.1, round(facts.epochs * step / shape.steps[-1], 1))}


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def _float(value: Any) -> float | None:
    """A number of the config; YAML reads 1e-4 as a string, LLaMA-Factory as a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
