"""Where the proof draws its lines between equal and not."""

from __future__ import annotations

import math

import pytest

from tunesmith.job.proof.behaviour import (
    LOST,
    NOTED,
    UNROUNDED,
    Distance,
    _answers_check,
    _logits_check,
    _unrounded_check,
)

pytestmark = pytest.mark.unit


def test_measured_right_merges_pass_and_the_smallest_planted_fault_fails() -> None:
    right = Distance(mean=1e-5, max=1.1e-4, kl=1.2e-11)
    one_module_of_210 = Distance(mean=0.033, max=0.5, kl=1.2e-4)
    assert _unrounded_check(right, [], 256).passed is True
    assert _unrounded_check(one_module_of_210, [], 256).passed is False


@pytest.mark.parametrize("figure", ["mean", "max", "kl"])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_each_figure_alone_can_fail(figure: str, value: float) -> None:
    distance = Distance(**({"mean": 0.0, "max": 0.0, "kl": 0.0} | {figure: value}))
    assert _unrounded_check(distance, [], 1).passed is False


def test_an_adapter_that_cannot_be_recomputed_is_skipped_with_the_reason() -> None:
    check = _unrounded_check(None, ["use_dora"], 1)
    assert check.passed is None
    assert "use_dora" in check.detail


def effect(mean: float) -> Distance:
    return Distance(mean=mean, max=mean, kl=mean)


def test_rounding_may_not_take_the_whole_adapter() -> None:
    moved = effect(1.0)
    assert _logits_check(effect(0.03), moved, LOST, "bfloat16").passed is True
    noted = _logits_check(effect(NOTED + 0.01), moved, LOST, "bfloat16")
    assert noted.passed is True
    assert "infer_dtype: float32 preserves it" in noted.detail
    assert _logits_check(effect(1.01), moved, LOST, "bfloat16").passed is False
    assert _logits_check(effect(NOTED + 0.01), moved, NOTED, "bfloat16").passed is False
    assert _logits_check(effect(math.nan), moved, LOST, "bfloat16").passed is False


def test_an_adapter_that_moves_nothing_fails() -> None:
    assert _logits_check(effect(0.0), effect(0.0), LOST, "bfloat16").passed is False


def test_answers_may_part_only_at_a_near_tie() -> None:
    near = 2 * UNROUNDED.max
    assert _answers_check([], 3, near).passed is True
    assert _answers_check([near / 2], 3, near).passed is True
    assert _answers_check([near / 2, near * 1.1], 3, near).passed is False
    assert _answers_check([math.nan], 3, near).passed is False
