"""docs/performance.md is what benchmarks/results.json says, and each figure can be repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.harness import Result

pytestmark = pytest.mark.contract


def results(root: Path) -> list[dict[str, Any]]:
    known = json.loads((root / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    return list(known["results"])


def test_the_page_is_rendered_from_the_results(root: Path) -> None:
    told = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    assert told == render.page(results(root)), "`make bench ONLY=doors` renders it anew"


def test_every_picture_of_the_page_is_there_and_no_other(root: Path) -> None:
    told = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    there = {file.name for file in (root / "docs" / "pictures").glob("performance_*.png")}
    assert {name for name in there if f"pictures/{name}" in told} == there
    assert told.count("(pictures/") == len(there)


def test_every_row_can_be_repeated_and_judges_itself_rightly(root: Path) -> None:
    rows = results(root)
    assert rows
    for row in rows:
        assert row["commands"].get("ours"), row["id"]
        assert (row["other"] is None) == (row["ratio"] is None), row["id"]
        if row["other"] is not None:
            assert row["commands"].get("other"), row["id"]
        assert row["met"] or row["why"], f"{row['id']} misses its bar and does not say why"
        assert math.isfinite(row["ours"])
        assert row["machine"] and row["versions"] and row["date"]
    for name, share in render._overview(rows):
        row = next(row for row in rows if row["id"] == name)
        # A ratio is rounded after it was judged.
        assert row["met"] == (share >= 1) or math.isclose(share, 1, rel_tol=0.02), name


def test_a_page_says_what_was_not_met_and_why() -> None:
    one = Result("x-1", "making | it", 2.0, 3.0, "s", 1.5, ">= 2x", False, "rust is rust")
    row = {**vars(one), "date": "2026-01-01", "machine": "m", "versions": {"torch": "1"}}
    text = render.page([row])
    assert "| [making \\| it](#x-1) | 2 s | 3 s | 1.5x | >= 2x | **no** | 2026-01-01 | 1 |" in text
    assert "Why it is missed: rust is rust." in text
    assert "0 of 1 bars are met." in text
