"""LLaMA-Factory's 39 example YAMLs: run by their verb, or refused for the true reason."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from example_configs import EXAMPLES, Example
from tunesmith.core.errors import UsageError
from tunesmith.plan import build
from tunesmith.plan.kind import Kind, kind_of, remedy_of
from tunesmith.project import Project

pytestmark = pytest.mark.unit

# The kinds that each verb takes which reads a config.
VERBS: dict[str, tuple[Kind, ...]] = {
    "train": ("train",),
    "predict": ("predict", "evaluate loss"),
}


def write(example: Example, folder: Path) -> Path:
    file = folder / "example.yaml"
    file.write_text(yaml.safe_dump(dict(example.values), sort_keys=False), encoding="utf-8")
    return file


def test_all_of_them_are_here() -> None:
    assert len({example.file for example in EXAMPLES}) == len(EXAMPLES) == 39
    verdicts = Counter(example.verdict for example in EXAMPLES)
    assert verdicts == {"runs": 17, "model": 3, "refused": 19}


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_each_is_taken_by_its_verb_or_refused_at_once(
    project: Project, tmp_path: Path, example: Example
) -> None:
    file = write(example, tmp_path)
    assert kind_of(example.values) == example.kind
    began = time.process_time()
    if example.verdict != "refused":
        build.read_config(project, file, (), VERBS[example.kind])
    else:
        with pytest.raises(UsageError) as caught:
            build.read_config(project, file, (), VERBS["train"])
        assert example.says in caught.value.message
        assert example.hint in caught.value.hint
        assert caught.value.hint
    assert time.process_time() - began < 1


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_another_verb_names_the_right_one(
    project: Project, tmp_path: Path, example: Example
) -> None:
    """The file is never run as something that it is not: a training is no prediction either."""
    file = write(example, tmp_path)
    other = VERBS["train" if example.kind == "predict" else "predict"]
    with pytest.raises(UsageError) as caught:
        build.read_config(project, file, (), other)
    assert f"a config to {example.kind}, not to {other[0]}" in caught.value.message
    assert remedy_of(example.values, file) in caught.value.hint
