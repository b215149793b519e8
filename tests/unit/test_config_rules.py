"""What our rules say to a config, held against what LLaMA-Factory's parser was seen to say."""

from __future__ import annotations

import pytest
import yaml

from settings import ACCEPTS, SETTINGS, Setting
from tunesmith.plan.rules.fault import REMOVE, Fault, written
from tunesmith.plan.rules.packages import TRACKERS
from tunesmith.plan.rules.pairs import PAIRS
from tunesmith.plan.rules.ranges import RANGES

# Depends on the machine, not on the config: a GPU's business (job/training/config_check.py).
_OF_THE_MACHINE = ("This device does not support `pure_bf16`.",)


def test_the_table_is_large_enough_to_mean_something() -> None:
    assert len(SETTINGS) >= 250
    assert sum(setting.parser != ACCEPTS for setting in SETTINGS) >= 80
    assert sum(setting.ours == ACCEPTS for setting in SETTINGS) >= 90
    assert len({str(setting) for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_is_judged_as_the_table_says(setting: Setting) -> None:
    faults = setting.faults
    assert (faults[0].key if faults else ACCEPTS) == setting.ours
    if setting.parser not in (ACCEPTS, *_OF_THE_MACHINE):
        assert faults, f"LLaMA-Factory refuses it: {setting.parser}"
    if faults and setting.parser == ACCEPTS:
        assert setting.outcome, "why is refused what its parser takes?"


@pytest.mark.parametrize(
    "setting", [setting for setting in SETTINGS if setting.ours != ACCEPTS], ids=str
)
def test_hints_followed_literally_lead_to_a_config_that_is_taken(setting: Setting) -> None:
    for fault in setting.faults:
        assert "\n" not in fault.message
        assert fault.hint
    if setting.mended is None:
        assert setting.values["stage"] == "ppo", "only a reward model is the user's to bring"


def test_each_rule_is_broken_by_a_setting() -> None:
    messages = {fault.message for setting in SETTINGS for fault in setting.faults}
    assert [pair.message for pair in PAIRS if pair.message not in messages] == []


def test_each_range_is_of_a_key_that_there_is() -> None:
    from settings import SCHEMA

    keys = [bounds.key for bounds in RANGES]
    assert [key for key in keys if key not in SCHEMA["properties"]] == []
    assert len(keys) == len(set(keys))
    assert {pair.key for pair in PAIRS} <= SCHEMA["properties"].keys()


def test_every_tracker_has_a_package() -> None:
    assert {"tensorboard", "wandb", "swanlab", "mlflow"} <= TRACKERS.keys()


def test_a_hint_is_written_as_yaml() -> None:
    fault = Fault("a", "a is wrong", {"a": REMOVE, "b": True, "c": "no", "d": None, "e": 0.1})
    assert fault.hint == (
        "remove `a` and write `b: true` and write `c: 'no'` and write `d: null` and write `e: 0.1`"
    )
    assert Fault("a", "a is wrong", advice="look").hint == "look"
    for value in (
        5e-5,
        1e-8,
        0.1,
        3.0,
        1e22,
        "1",
        "0.5,0.5",
        "no",
        "null",
        "a: b",
        "x",
        True,
        None,
    ):
        assert yaml.safe_load(f"a: {written(value)}") == {"a": value}
