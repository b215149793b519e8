"""Broken files that need neither LLaMA-Factory nor time: its verdict is on record beside them.

tests/e2e/test_dataset_truth.py measures the record and checks the other files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import entry_from_raw
from tunesmith.dataset.media import MediaPlace

pytestmark = pytest.mark.unit

BROKEN = Path(__file__).resolve().parent.parent / "broken"
TABLES = (".csv", ".parquet", ".arrow", ".txt")
CASES: dict[str, dict[str, Any]] = {
    name: case
    for name, case in json.loads((BROKEN / "cases.json").read_text("utf-8")).items()
    if "parts" not in case and not name.endswith(TABLES)
}


def test_every_file_has_a_case() -> None:
    cases = json.loads((BROKEN / "cases.json").read_text("utf-8"))
    files = {path.name for path in (BROKEN / "files").iterdir()}
    assert files == {name for name, case in cases.items() if "parts" not in case}


@pytest.mark.parametrize("name", CASES)
def test_broken_file_is_explained_and_counted(name: str) -> None:
    case, path = CASES[name], BROKEN / "files" / name
    entry = entry_from_raw(name, {"file_name": name, **case["entry"]}, BROKEN)
    media = MediaPlace(BROKEN / "media", case.get("template"))
    report = check_file(path, entry, case.get("stage", "sft"), media=media)
    told = [
        (finding.severity, finding.row, finding.line)
        for finding in report.findings
        if case["says"] in finding.message + finding.fix
    ]
    assert (case.get("severity", "error"), case.get("row"), case.get("line")) in told
    assert report.kept == case["kept"]
