"""Long files are read in pieces, and give what a reading of the whole gives."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.dataset import reading, report, scan
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.reading import Reader
from tunesmith.dataset.report import DatasetReport

pytestmark = pytest.mark.unit

ALPACA = Entry("k", columns={"prompt": "instruction", "query": "input", "response": "output"})


def row(number: int, **change: Any) -> str:
    value = {"instruction": f"question {number}", "input": "", "output": f"answer {number}"}
    return json.dumps(value | change, ensure_ascii=False)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of some hundred bytes, so that short files are read as long ones are."""
    monkeypatch.setattr(reading, "BATCH_BYTES", 300)
    monkeypatch.setattr(reading, "_MORE_BYTES", 150)
    monkeypatch.setattr(scan, "_LOOK_AHEAD", 100)
    monkeypatch.setattr(scan, "_REFILL", 200)
    monkeypatch.setattr(scan, "_BATCH", 3)


LINES = [
    "\n".join(row(n) for n in range(40)),
    "\n".join(row(n, output="你好" * n) for n in range(1, 20)),
    "\r\n".join(row(n) for n in range(40)) + "\r\n\r\n",
    "\n".join(row(n, output="" if n == 30 else "a") for n in range(40)),
    "\n".join(row(n) if n != 30 else "{oops}" for n in range(40)),
    "\n".join(row(n)[: -1 if n == 30 else None] for n in range(40)),
    ",\n".join(row(n) for n in range(40)),
    "\n".join(row(n if n < 30 else 3) for n in range(32)),
    row(1) + "\n" + row(2, output="x" * 5000) + "\n" + row(3, output=None),
]
LISTS = [
    "[\n" + ",\n".join(row(n) for n in range(40)) + "\n]\n",
    "[" + ", ".join(row(n, output="你好" * n) for n in range(1, 30)) + "]",
    "[\n" + ",\n".join(row(n, output="" if n == 30 else "a") for n in range(40)) + "\n]",
    "[\n" + ",\n".join(row(n) if n != 30 else "{oops}" for n in range(40)) + "\n]",
    "[\n" + ",\n".join(row(n) for n in range(40)),
    "[\n" + "\n".join(row(n) for n in range(40)) + "\n]",
    json.dumps([json.loads(row(n)) for n in range(30)], indent=4) + "\n",
    "[" + row(1) + ",\n" + row(2, output="x" * 5000) + ",\n" + row(3, output=None) + "]",
    "[\n" + ",\n".join(row(n) for n in range(40)) + "\n] more",
]


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DatasetReport, DatasetReport]:
    pieces = check_file(path, ALPACA)
    monkeypatch.undo()
    return pieces, check_file(path, ALPACA)


@pytest.mark.parametrize("text", [*LINES, *LISTS])
@pytest.mark.usefixtures("short_pieces")
def test_pieces_give_what_the_whole_gives(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("x.jsonl" if text in LINES else "x.json")
    path.write_bytes(text.encode())
    pieces, whole = both(path, monkeypatch)
    assert replace(pieces, findings=()) == replace(whole, findings=())
    assert {f.render() for f in pieces.findings} == {f.render() for f in whole.findings}


@pytest.mark.usefixtures("short_pieces")
def test_bytes_that_are_no_utf8_are_placed_in_any_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    lines = [row(n).encode() for n in range(40)]
    lines[30] = row(30, output="café").encode("latin-1")
    path.write_bytes(b"\n".join(lines))
    pieces, whole = both(path, monkeypatch)
    assert pieces.errors[0] == whole.errors[0]
    assert (pieces.errors[0].line, pieces.kept, pieces.sha256) == (31, 0, whole.sha256)


@pytest.mark.parametrize("kind", ["lines", "list on one line"])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((reading, "BATCH_BYTES"), (reading, "_MORE_BYTES"), (scan, "_REFILL")):
        monkeypatch.setattr(module, name, 400_000)  # a piece; in truth some megabytes
    monkeypatch.setattr(scan, "_LOOK_AHEAD", 50_000)
    monkeypatch.setattr(scan, "_BATCH", 200)
    peaks = []
    for count in (2_000, 8_000):
        path = tmp_path / ("x.jsonl" if kind == "lines" else "x.json")
        rows = [row(number, output="x" * 930) for number in range(count)]
        text = "\n".join(rows) if kind == "lines" else f"[{', '.join(rows)}]"
        path.write_text(text)
        del rows, text
        tracemalloc.start()
        assert sum(len(piece.rows) for piece in Reader(path).pieces()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0] < 8_000_000


def test_findings_beyond_the_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "HELD", 100)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(row(n, output="" if n else "a") for n in range(301)))
    found = check_file(path, ALPACA)
    assert (len(found.errors), found.error_count) == (100, 300)
    assert found.lines(50)[-1] == "... and 250 more"
    path.write_text("\n".join("{oops}" for _ in range(300)))
    broken = check_file(path, ALPACA)
    assert (len(broken.errors), broken.error_count) == (100, 300)
    path.write_text("\n".join(json.dumps({"instruction": f"{n}", "input": ""}) for n in range(300)))
    absent = check_file(path, ALPACA)
    assert absent.error_count == 1  # the column, once, and not each row
    assert 'no row has the column "output"' in absent.errors[0].message


def test_a_folder_is_read_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text(row(1) + "\n" + row(2) + "\n")
    (folder / "b.jsonl").write_text(row(3) + "\n" + row(4, output="") + "\n")
    found = check_file(folder, ALPACA)
    assert (found.rows, found.kept) == (4, 4)
    assert [(f.file, f.row, f.line) for f in found.errors] == [("b.jsonl", 2, 2)]
    assert found.errors[0].render().startswith("b.jsonl, row 2, line 2: ")
    (folder / ".DS_Store").write_text("")
    hidden = check_file(folder, ALPACA)
    assert (hidden.errors[0].file, hidden.kept) == (".DS_Store", 0)


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(row(1))
    told: list[tuple[int, int]] = []
    check_file(path, ALPACA, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert told[-1] == (size, size)
