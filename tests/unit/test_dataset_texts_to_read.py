"""Texts without questions and answers: data of stage pt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.registry import check_registered, check_unregistered, register

ROWS = [{"text": "A long text."}, {"text": "Another."}, {"text": ""}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_file_with_one_text_column_is_checked_for_its_stage(file: Path) -> None:
    report = check_unregistered(file)
    assert (report.rows, report.kept) == (3, 3)
    [finding] = report.findings
    assert (finding.severity, finding.row, finding.message) == ("warning", 3, '"text" is empty')


def test_it_is_registered_and_found_again(file: Path) -> None:
    entry = register(file.parent, "rows", file)[0]
    assert (entry.columns, entry.stage()) == ({"prompt": "text"}, "pt")
    [report] = check_registered(file.parent, "rows")
    assert not report.errors


def test_in_another_stage_it_is_refused_with_the_stage_it_is_for(file: Path) -> None:
    register(file.parent, "rows", file)
    [report] = check_registered(file.parent, "rows", "sft")
    with pytest.raises(UsageError, match="`stage: pt`"):
        report.raise_if_bad()


def test_a_text_beside_a_question_stays_a_column_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "q", "output": "a", "text": "t"}]))
    entry = register(tmp_path, "rows", path)[0]
    assert (entry.columns or {}).keys() == {"prompt", "response"}
    assert entry.stage() == "sft"
