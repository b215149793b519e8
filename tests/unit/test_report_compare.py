"""Runs side by side: figures, the best of a line, what makes them no comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke import Program
from invoke.parser import Parser, ParserContext
from rich.console import Console

from tests.unit.run_folder import build_run
from tunesmith.cli import results
from tunesmith.core.errors import UsageError
from tunesmith.report.compare import compare, comparison_table, write_comparison

pytestmark = pytest.mark.unit


def other_run(folder: Path, name: str, **config: Any) -> Path:
    """Another run: its own id, a better held-out loss, more forgetting, other parameters."""
    run = build_run(folder).rename(folder / name)
    request = json.loads((run / "run.json").read_text(encoding="utf-8")) | {"run_id": name}
    (run / "run.json").write_text(json.dumps(request), encoding="utf-8")
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | config
    (run / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    evaluation["after"]["loss"], evaluation["after"]["guard"]["loss"] = 1.5, 3.1
    (run / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return run


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [build_run(tmp_path / "a"), other_run(tmp_path / "b", "second", learning_rate=0.001)]


def test_figures_stand_side_by_side_and_the_best_is_marked(two: list[Path]) -> None:
    lines = {line.label: line for line in compare(two).results}
    assert lines["held-out loss, after"].values == ("1.689", "1.500")
    assert lines["held-out loss, after"].best == 1
    assert lines["guard loss, after"].best == 0
    assert lines["held-out loss, before"].best is None
    # Equal figures have no best one.
    assert lines["Prompts met"].best is None
    assert lines["cost"].values == ("0.21 CNY", "0.21 CNY")


def test_only_differing_parameters_are_shown(two: list[Path]) -> None:
    found = compare(two)
    assert {line.label: line.values for line in found.parameters} == {
        "learning_rate": ("0.0005", "0.001")
    }
    assert found.warnings == ()


def test_other_held_out_rows_are_no_comparison(tmp_path: Path) -> None:
    runs = [build_run(tmp_path / "a"), other_run(tmp_path / "b", "second", val_size=0.2)]
    assert "held-out rows are not the same" in compare(runs).warnings[0]


def test_what_one_run_lacks_is_a_dash(two: list[Path]) -> None:
    (two[1] / "evaluation.json").unlink()
    lines = {line.label: line for line in compare(two).results}
    assert lines["held-out loss, after"].values == ("1.689", "–")


def test_page_and_table_hold_every_run(two: list[Path], tmp_path: Path) -> None:
    third = other_run(tmp_path / "c", "third", lora_rank=4)
    runs = [*two, third]
    page = write_comparison(runs, tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(comparison_table(runs))
    for name in (two[0].name, "second", "third"):
        assert name in page
        assert name in stream.getvalue()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "default-src 'none'" in page
    chinese = write_comparison(runs, tmp_path / "zh.html", language="zh")
    assert "不同的参数" in chinese.read_text(encoding="utf-8")


def test_answers_are_text_and_never_markup(two: list[Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>{{ 7 * 7 }}"
    row = {"prompt": evil, "answer": evil, "reference": None, "set": "prompts", "met": None}
    (two[0] / "after.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    page = write_comparison(two, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page


@pytest.mark.parametrize("count", [0, 1])
def test_one_run_is_no_comparison(two: list[Path], count: int) -> None:
    with pytest.raises(UsageError, match="two different runs"):
        compare(two[:count])
    with pytest.raises(UsageError, match="two different runs"):
        compare([two[0], two[0]])


def parsed(line: str) -> list[ParserContext]:
    import tasks

    initial = ParserContext(args=Program().core_args())
    parser = Parser(initial=initial, contexts=tasks.ns.to_contexts())
    return list(parser.parse_argv(line.split()))


def test_runs_are_named_as_words_after_compare() -> None:
    # A run may have the name of a task.
    task = parsed("report --compare 20260114-093005-x demo --language zh third")[1]
    assert task.name == "report"
    assert task.args.compared.value == ["20260114-093005-x", "demo", "third"]
    assert task.args.language.value == "zh"


def test_a_page_of_many_runs_has_a_name_that_a_file_can_have() -> None:
    assert results.page_name(["a", "b"]) == "a+b.html"
    many = [f"{number}".rjust(80, "r") for number in range(9)]
    names = {results.page_name(many), results.page_name(many[::-1])}
    assert len(names) == 2
    assert max(map(len, names)) < 200


def test_without_compare_a_word_is_the_next_task() -> None:
    assert [task.name for task in parsed("report demo")[1:]] == ["report", "demo"]
