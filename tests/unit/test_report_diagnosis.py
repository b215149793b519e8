"""Each rule speaks on the curve it is for, and is silent on a clean one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tunesmith.job.run.codec import decode
from tunesmith.job.run.events import Event
from tunesmith.job.run.schema import DataFile, RunRequest
from tunesmith.report.curve import Curve, read_curve
from tunesmith.report.diagnosis import Advice, RunFacts, diagnose, facts_of

pytestmark = pytest.mark.unit

FACTS = RunFacts(finished=True, rows=120, epochs=3.0, learning_rate=1e-4, max_grad_norm=1.0)


def curve_of(
    loss: Callable[[int], float],
    steps: int = 120,
    *,
    grad_norm: float | None = 1.0,
    validation: Callable[[int], float] | None = None,
) -> Curve:
    """A curve that logs each step and validates each tenth of the way."""
    events: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        event = {"event": "log", "step": step, "total_steps": steps, "loss": loss(step)}
        events.append(event | {"learning_rate": 1e-4, "grad_norm": grad_norm})
        if validation and step % max(1, steps // 10) == 0:
            events.append({"event": "eval", "step": step, "loss": validation(step)})
    return read_curve([decode(Event, event) for event in events])


def decay(step: int, steps: int = 120) -> float:
    """A clean run: four time constants from 3 towards 1."""
    return 1 + 2 * math.exp(-4 * step / steps)


def codes(curve: Curve, facts: RunFacts = FACTS) -> list[str]:
    return [advice.code for advice in diagnose(curve, facts)]


def one(code: str, curve: Curve, facts: RunFacts = FACTS) -> Advice:
    return next(advice for advice in diagnose(curve, facts) if advice.code == code)


def noisy(seed: int, scale: float) -> Callable[[int], float]:
    noise = random.Random(seed)
    return lambda step: decay(step) + noise.gauss(0, scale)


def test_clean_decay_is_healthy_and_nothing_else() -> None:
    (advice,) = diagnose(curve_of(decay, validation=lambda step: decay(step) + 0.1), FACTS)

    assert (advice.code, advice.level, advice.change) == ("healthy", "info", {})
    assert advice.figures["start"] == pytest.approx(3, abs=0.1)
    assert "62%" in advice.text or "64%" in advice.text or "65%" in advice.text


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.02, 0.1, 0.25])
def test_no_false_alarm_on_noise(seed: int, scale: float) -> None:
    assert codes(curve_of(noisy(seed, scale))) == ["healthy"]


def test_still_falling_asks_for_more_epochs() -> None:
    advice = one("still_falling", curve_of(lambda step: 3 - step / 120))

    assert advice.level == "info"
    assert advice.change == {"num_train_epochs": 5.0}
    assert advice.figures["tail_share"] == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_still_falling_is_seen_through_noise(seed: int) -> None:
    noise = random.Random(seed)

    assert "still_falling" in codes(curve_of(lambda s: 3 - s / 80 + noise.gauss(0, 0.1)))


def test_the_end_of_an_unfinished_run_says_nothing() -> None:
    falling = curve_of(lambda step: 3 - step / 120)

    assert codes(falling, replace(FACTS, finished=False)) == ["healthy"]


def test_slow_fall_asks_for_a_larger_rate() -> None:
    advice = one("slow", curve_of(lambda step: 3 - 0.0015 * step))

    assert advice.change == {"learning_rate": 3e-4}
    assert advice.figures["share"] == pytest.approx(0.06, abs=0.01)


def test_flat_loss_is_named() -> None:
    noise = random.Random(3)
    advice = one("flat", curve_of(lambda _: 2.5 + noise.gauss(0, 0.1)))

    assert advice.level == "warning"
    assert advice.change == {"learning_rate": 3e-4}


def test_overfitting_names_the_step_of_the_minimum() -> None:
    curve = curve_of(decay, validation=lambda step: 1.5 + abs(step - 60) / 60)
    advice = one("overfit", curve)

    assert advice.figures["step"] == 60
    assert "step 60" in advice.text
    assert advice.change == {"num_train_epochs": 1.5}


def test_overfitting_wins_over_more_epochs() -> None:
    curve = curve_of(lambda s: 3 - s / 60, validation=lambda step: 2 + abs(step - 60) / 60)

    assert codes(curve) == ["overfit"]


def test_a_validation_that_wobbles_is_no_overfitting() -> None:
    def wobble(step: int) -> float:
        return decay(step) + 0.2 + (0.01 if step % 24 == 0 else 0.0)

    assert codes(curve_of(decay, validation=wobble)) == ["healthy"]


def test_spikes_ask_for_a_gentler_run() -> None:
    advice = one("spikes", curve_of(lambda step: decay(step) + 3 * (step in (40, 80))))

    assert advice.figures["count"] == 2
    assert advice.figures["step"] == 40
    assert advice.change == {"learning_rate": 5e-5, "max_grad_norm": 0.5}


def test_few_spikes_are_information_only() -> None:
    advice = one("few_spikes", curve_of(lambda step: decay(step) + 3 * (step == 40)))

    assert (advice.level, advice.change) == ("info", {})


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number(loss: float) -> None:
    curve = curve_of(lambda step: decay(step) if step < 100 else loss)
    advice = diagnose(curve, replace(FACTS, max_grad_norm=5.0))[0]

    assert (advice.code, advice.figures["step"], advice.figures["count"]) == ("not_finite", 100, 21)
    assert advice.change == {"learning_rate": 5e-5, "max_grad_norm": 1.0}


def test_a_gradient_that_is_no_number_points_at_attention() -> None:
    advice = one("gradient_nan", curve_of(lambda _: 0.0, grad_norm=math.nan))

    assert advice.change == {"flash_attn": "disabled"}


def test_zero_gradient_means_nothing_trains() -> None:
    curve = curve_of(lambda _: 2.5, grad_norm=0.0)

    assert codes(curve) == ["gradient_zero"]
    assert one("gradient_zero", curve).figures == {"zeros": 120, "of": 120}


def test_a_run_that_diverges() -> None:
    advice = one("rising", curve_of(lambda step: max(decay(step), 0.03 * (step - 30))))

    assert advice.change["learning_rate"] == 5e-5
    assert advice.figures["end"] == pytest.approx(2.7, abs=0.1)


def test_memorised_data() -> None:
    advice = one("memorised", curve_of(lambda step: 3 * math.exp(-step / 10)))

    assert advice.level == "warning"
    assert 0 < float(advice.change["num_train_epochs"]) < 3


def test_few_rows_and_few_steps() -> None:
    found = codes(curve_of(lambda s: decay(s, 12), 12), replace(FACTS, rows=20))

    assert found[:2] == ["few_rows", "few_steps"]
    assert one("few_steps", curve_of(lambda s: decay(s, 12), 12)).change == {
        "num_train_epochs": 8.0
    }


def test_too_few_points_to_judge() -> None:
    assert codes(curve_of(decay, 5), FACTS)[-1] == "few_points"
    assert codes(read_curve([]), FACTS) == ["few_points"]


def test_held_out_loss_that_did_not_fall() -> None:
    facts = replace(FACTS, held_out_before=2.0, held_out_after=2.1)

    assert codes(curve_of(decay), facts) == ["no_gain"]


def test_general_prompts_that_got_worse_are_forgetting() -> None:
    facts = replace(FACTS, guard_before=2.0, guard_after=2.6)
    found = one("forgetting", curve_of(decay), facts)

    assert found.figures["rise"] == pytest.approx(0.3)
    assert found.change["learning_rate"] == FACTS.learning_rate / 2
    # The curve itself is as good as before.
    assert codes(curve_of(decay), facts) == ["forgetting", "healthy"]
    for after in (1.5, 2.0, 2.19):
        assert codes(curve_of(decay), replace(facts, guard_after=after)) == ["healthy"]


def test_fewer_right_answers_are_told_where_the_loss_is_not() -> None:
    facts = replace(FACTS, guard_before=1.850, guard_after=1.856, guard_right=(6, 4, 10))
    assert one("fewer_right", curve_of(decay), facts).level == "info"
    assert codes(curve_of(decay), replace(facts, guard_right=(6, 5, 10))) == ["healthy"]
    # One statement is enough.
    worse = codes(curve_of(decay), replace(facts, guard_after=2.5))
    assert "forgetting" in worse
    assert "fewer_right" not in worse


def test_warnings_come_first() -> None:
    levels = [a.level for a in diagnose(curve_of(lambda s: 3 - s / 10, 20), FACTS)]

    assert all(a >= b for a, b in pairwise(level == "warning" for level in levels))
    assert len(levels) >= 2


def test_unknown_facts_leave_the_figure_out_of_the_change() -> None:
    bare = RunFacts(finished=True)

    assert one("still_falling", curve_of(lambda s: 3 - s / 120), bare).change == {}
    assert one("slow", curve_of(lambda s: 3 - 0.0015 * s), bare).change == {}


def test_every_advice_speaks_chinese() -> None:
    for curve in (curve_of(decay), curve_of(lambda s: 3 - s / 120), curve_of(decay, 5)):
        for advice in diagnose(curve, FACTS, "zh"):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in advice.text)


def test_facts_come_from_the_files() -> None:
    facts = facts_of(
        RunRequest(data=(DataFile(rows=80), DataFile(rows=40))),
        {"num_train_epochs": 3, "learning_rate": "1e-4"},
        {"train": "succeeded"},
        {"before": {"loss": 3.0}, "after": None},
    )

    assert facts == RunFacts(
        finished=True, rows=120, epochs=3.0, learning_rate=1e-4, held_out_before=3.0
    )
