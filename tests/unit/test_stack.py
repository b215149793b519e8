"""stack.yml: the rule of the pair, and drift of the locks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.project import Project
from tunesmith.stack.definition import DIGEST_PREFIX, drift, load_stack

pytestmark = pytest.mark.unit


@pytest.fixture
def text(project: Project) -> str:
    return project.stack.path.read_text(encoding="utf-8")


def load(folder: Path, text: str) -> object:
    file = folder / "stack.yml"
    file.write_text(text, encoding="utf-8")
    return load_stack(file)


def test_ours_is_good_and_the_locks_are_of_it(project: Project) -> None:
    assert project.stack.python == "3.10"
    assert project.stack.llamafactory == "0.9.3"
    assert drift(project.stack) == ()


def test_a_pair_that_pypi_forbids_is_refused_with_the_reason(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text.replace('llamafactory: "0.9.3"', 'llamafactory: "0.9.4"'))
    told = "LLaMA-Factory 0.9.4 needs Python >=3.11 (PyPI), the stack has 3.10"
    assert told in caught.value.message
    assert caught.value.hint == "the newest LLaMA-Factory for Python 3.10 is 0.9.3"


def test_a_pin_that_contradicts_the_pair_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="but requirements say"):
        load(tmp_path, text.replace("modelscope]==0.9.3", "modelscope]==0.9.2"))


def test_an_unknown_release_needs_its_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="has no line in llamafactory_python"):
        load(tmp_path, text.replace('llamafactory: "0.9.3"', 'llamafactory: "1.0.0"'))


def test_a_number_for_a_version_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"must be in quotes \(found 3.1\)"):
        load(tmp_path, text.replace('python: "3.10"', "python: 3.10"))


def test_a_missing_key_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="the key 'platform' is missing"):
        load(tmp_path, text.replace("platform: ", "platfrom: "))


def test_drift_is_seen(tmp_path: Path, text: str, project: Project) -> None:
    stack = load_stack(project.stack.path)
    locks = tmp_path / "locks"
    locks.mkdir()
    (tmp_path / "stack.yml").write_text(text, encoding="utf-8")
    moved = load_stack(tmp_path / "stack.yml")
    assert [line.endswith("makes it") for line in drift(moved)] == [True, True]
    for name, flavour in moved.flavours.items():
        (locks / f"{name}.txt").write_text(DIGEST_PREFIX + stack.inputs_digest(flavour) + "\n")
    (locks / "extras").mkdir()
    assert [line.endswith("makes it") for line in drift(moved)] == [True] * len(moved.extras)
    for extra in moved.extras.values():
        extra.lock.write_text(DIGEST_PREFIX + moved.extra_digest(extra) + "\n")
    assert drift(moved) == ()
    (tmp_path / "stack.yml").write_text(text.replace("badam==1.4", "badam==1.3"))
    assert [line.split()[0] for line in drift(load_stack(tmp_path / "stack.yml"))] == [
        str(locks / "extras" / "badam.txt")
    ]
    (tmp_path / "stack.yml").write_text(text.replace("peft==0.15.2", "peft==0.15.1"))
    assert len(drift(load_stack(tmp_path / "stack.yml"))) == 2


def test_an_unknown_flavour_lists_the_known(project: Project) -> None:
    with pytest.raises(UsageError, match="known are cu128, cu126"):
        project.stack.flavour("cu124")


def test_an_unknown_extra_is_told_with_the_one_that_was_meant(project: Project) -> None:
    stack = project.stack
    assert [extra.name for extra in stack.extras_named("galore, wandb,galore")] == [
        "galore",
        "wandb",
    ]
    with pytest.raises(UsageError, match="extra 'gallore' is not in") as refused:
        stack.extras_named("wandb,gallore")
    assert refused.value.hint == "did you mean `--with galore`?"


def test_an_extra_adds_to_every_lock_and_changes_none(project: Project) -> None:
    stack, pinned = project.stack, {}
    for extra in stack.extras.values():
        assert set(extra.provides) <= extra.packages
        for flavour in stack.flavours.values():
            assert not extra.packages & flavour.packages, extra.name
        for name, version in re.findall(r"(?m)^([\w.-]+)==([^ ]+)", extra.lock.read_text("utf-8")):
            assert pinned.setdefault(name, version) == version, f"{extra.name}: {name}"
        assert "--hash=sha256:" in extra.lock.read_text("utf-8")
