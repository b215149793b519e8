"""Broken configs: refused in one line, with a change that works when it is made."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from broken_configs import BROKEN, Broken
from tunesmith.core.errors import UsageError
from tunesmith.plan import build
from tunesmith.project import Project

pytestmark = pytest.mark.unit

STATIC = [row for row in BROKEN if row.layer == "static"]
PARSER = [row for row in BROKEN if row.layer == "parser"]


def read(project: Project, folder: Path, text: str) -> None:
    file = folder / "typed.yaml"
    file.write_text(text, encoding="utf-8")
    build.read_config(project, file, (), ("train",))


def test_the_table_has_what_was_promised() -> None:
    assert len(BROKEN) >= 40
    assert len(PARSER) >= 12
    assert len({row.name for row in BROKEN}) == len(BROKEN)


@pytest.mark.parametrize("row", STATIC, ids=str)
def test_our_rules_refuse_it_at_once(project: Project, tmp_path: Path, row: Broken) -> None:
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        read(project, tmp_path, row.text)
    assert time.process_time() - began < 1
    assert row.says in caught.value.message
    assert "typed.yaml" in caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    told = f"{caught.value.message} {caught.value.hint} {' '.join(caught.value.detail)}"
    assert [words for words in row.named if words not in told] == []


@pytest.mark.parametrize("row", PARSER, ids=str)
def test_our_rules_leave_to_the_parser_what_they_cannot_know(
    project: Project, tmp_path: Path, row: Broken
) -> None:
    read(project, tmp_path, row.text)


@pytest.mark.parametrize("row", BROKEN, ids=str)
def test_the_change_ends_it(project: Project, tmp_path: Path, row: Broken) -> None:
    read(project, tmp_path, row.mended)
