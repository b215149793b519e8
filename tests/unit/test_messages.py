"""LLaMA-Factory's sentences in what a run prints: the class, the keys, the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broken_configs import ROOT
from settings import ACCEPTS, SETTINGS
from tunesmith.job.run import messages
from tunesmith.job.run.config_messages import CONFIG, REMEDIES
from tunesmith.job.run.failures import classify_exit, classify_text
from tunesmith.job.run.messages import HOLE, Known

pytestmark = pytest.mark.unit

# Keys that no YAML of a training has, but that the sentence is about.
_OF_OTHERS = {"save_dir", "lang"}


@pytest.mark.parametrize("known", messages.known(), ids=lambda known: known.sentence[:60])
def test_each_sentence_is_told_apart(known: Known) -> None:
    text = known.sentence.replace(HOLE, "['a', \"b\"]")
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in f\nValueError: {text}\n'
    assert classify_text(trace) == known.failure
    assert classify_exit(1, trace, oom_killed=False)[0] == known.failure
    found = messages.find(trace)
    assert found is not None
    assert found.failure == known.failure


def test_the_machine_is_blamed_first() -> None:
    text = "RuntimeError: CUDA out of memory. Cannot resize embedding layers of a quantized model."
    assert classify_text(text) == "gpu_oom"


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'x'",
        "AttributeError: 'NoneType' object has no attribute 'shape'",
        'File "loader.py", line 3, in load\nModuleNotFoundError: x is not found.',
        "ZeroDivisionError: division by zero",
    ],
)
def test_faults_of_code_stay_such(text: str) -> None:
    assert classify_text(text) == "code"


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("ValueError: `r` should be a positive integer value but the value passed is 0", "config"),
        ("ValueError: Invalid learning rate: -0.001", "config"),
        ("ValueError: batch_size should be a positive integer value, but got 0", "config"),
        ("ValueError: num_proc must be an integer > 0.", "config"),
        ("ValueError: dropout probability has to be between 0 and 1, but got 1.5", "config"),
        ("RuntimeError: WandbCallback requires wandb to be installed. Run `pip`", "config"),
        ("ValueError: Can't find 'adapter_config.json' at 'rewards/one'", "config"),
        ("PackageNotFoundError: No package metadata was found for The 'hqq' dist", "config"),
        ("ImportError: You need to install `lomo_optim` in order to use LOMO", "config"),
        ("ValueError: Your setup doesn't support bf16/gpu.", "config"),
        ("StopIteration: ", "data"),
        (
            "ValueError: num_samples should be a positive integer value, but got num_samples=0",
            "data",
        ),
    ],
)
def test_what_the_libraries_say(text: str, failure: str) -> None:
    assert classify_text(text) == failure


# What torch and Python say to a number that nothing had looked at: our rules refuse it before.
_SAYS_NOTHING = (
    "RuntimeError: Expected tensor for argument",
    "ZeroDivisionError",
    "RuntimeError: uniform_ expects",
    "RuntimeError: element 0 of tensors",
)


def test_what_came_of_each_setting_of_the_table_is_no_fault_of_code() -> None:
    outcomes = {row.outcome for row in SETTINGS if ":" in row.outcome.split(" ")[0]}
    outcomes |= {f"ValueError: {row.parser}" for row in SETTINGS if row.parser != ACCEPTS}
    assert len(outcomes) > 100
    code = [text for text in sorted(outcomes) if classify_text(text) == "code"]
    assert [text for text in code if not text.startswith(_SAYS_NOTHING)] == []


def test_the_keys_are_those_of_configs() -> None:
    schema = json.loads(Path(ROOT / "configs/schema/llamafactory-0.9.3.schema.json").read_text())
    keys = {key for texts in CONFIG.values() for words in texts.values() for key in words.split()}
    assert sorted(keys - schema["properties"].keys() - _OF_OTHERS) == []
    sentences = {text for texts in CONFIG.values() for text in texts}
    assert sorted(REMEDIES.keys() - sentences) == []
