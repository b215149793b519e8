"""The before/after table for the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.unit.run_folder import answers, build_run
from tunesmith.core.errors import UsageError
from tunesmith.report.terminal import summary_table

pytestmark = pytest.mark.unit


def printed(run: Path, width: int = 120, **options: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    console.print(summary_table(run, **options))  # type: ignore[arg-type]
    return stream.getvalue()


def test_shows_answers_marks_and_figures(tmp_path: Path) -> None:
    text = " ".join(printed(build_run(tmp_path), width=400).split())

    assert "I am a helpful AI assistant trained by Hugging Face." in text
    assert "no → yes" in text
    assert "no → no" in text
    assert "Held-out loss 3.41 → 1.69 (−50%, nat per token)" in text
    assert "Merge proof passed (4 of 4 checks)" in text


def test_long_answers_are_cut_and_rows_limited(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    table = summary_table(run, rows=7)

    assert table.row_count == 7
    assert "2 more answers are in report.html" in str(table.caption)
    before = [str(cell) for cell in table.columns[1].cells]
    assert before[6].endswith("…")
    assert max(len(cell) for cell in before) == 60


def test_an_answer_cannot_colour_or_move_the_terminal(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    row = {**answers(tuned=True)[0], "answer": "[red]\x1b[2J\x07loud\r\nline[/red]"}
    (run / "after.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    text = printed(run)

    assert "[red][2Jloud line[/red]" in text
    assert "\x1b" not in text


def test_without_answers_the_figures_stay(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    for name in ("before.jsonl", "after.jsonl", "evaluation.json"):
        (run / name).unlink()

    table = summary_table(run)

    assert table.row_count == 0
    assert "Held-out loss – (not measured)" in str(table.caption)


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        summary_table(tmp_path)
