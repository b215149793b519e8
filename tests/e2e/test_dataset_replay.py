"""The verbs of data sets, with the real environment; the replay: tests/training/test_replay.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cli
from tunesmith.core.errors import UsageError
from tunesmith.dataset.check import check_file
from tunesmith.dataset.registry import load_registry, register
from tunesmith.dataset.split import split
from tunesmith.dataset.tables import tables_of
from tunesmith.project import Project

pytestmark = pytest.mark.e2e


@pytest.mark.usefixtures("base_model")
def test_check_of_a_config_tells_rows_tokens_time_and_cost(root: Path, tmp_path: Path) -> None:
    config = "configs/train/smollm2_135m_lora_sft.yaml"
    words = ["--gpu", "RTX4090", "--price", "1.98/h", "--picture", str(tmp_path / "x.png")]
    done = cli.run(root, "data.check", "--config", config, *words, "cutoff_len=60")
    assert done.returncode == 0, done.stderr
    assert "philosophy_conch: 120 rows, 120 kept, 0 dropped" in done.stdout
    assert re.search(
        r"cut at cutoff_len 60: [\d.]+% of the rows; cutoff_len \d+ keeps", done.stdout
    )
    assert re.search(r"\d+ steps; on one RTX4090 about .* cost [\d.]+ to [\d.]+ \(an", done.stdout)
    assert "validation: 12 rows" in done.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("base_model")
def test_preview_in_a_pipe(root: Path) -> None:
    done = cli.run(root, "data.preview", "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "--- row 1 of philosophy_conch: " in done.stdout
    assert re.search(r"<\|im_start\|>assistant\n\[\[我是 philosophy.*\]\]", done.stdout, re.DOTALL)


def test_csv_is_registered_and_split(
    tmp_path: Path, project: Project, training_python: Path
) -> None:
    tables = tables_of(training_python, {})
    path = tmp_path / "rows.csv"
    lines = [f'"question {n}, please","answer {n * 7919}"' for n in range(20)]
    path.write_text("instruction,output\n" + "\n".join(lines) + "\n")
    with pytest.raises(UsageError) as refused:
        register(tmp_path, "rows", path)
    assert "inv stack.install" in refused.value.hint
    entry = register(tmp_path, "rows", path, tables=tables)[0]
    assert entry.columns == {"prompt": "instruction", "response": "output"}
    made = split(tmp_path, "rows", 0.25, 1, tables=tables)
    assert (made.train.rows, made.validation.rows) == (15, 5)
    for part in (made.train, made.validation):
        written = load_registry(tmp_path)[str(part.entry.key)]
        assert check_file(part.file, written).kept == part.rows
