"""The verbs on data: what they refuse before any work, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.cli import data as cli_data
from tunesmith.cli.data import Asked
from tunesmith.core.errors import UsageError

pytestmark = pytest.mark.unit

CONFIG = "configs/train/smollm2_135m_lora_sft.yaml"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda r: cli_data.check(r, Asked(keys="a", file="b")), "--file and --dataset both"),
        (lambda r: cli_data.check(r, Asked(config="c", file="b")), "--file and --config both"),
        (lambda r: cli_data.check(r, Asked(gpu="RTX4090")), "need a --config"),
        (lambda r: cli_data.check(r, Asked(config=CONFIG, price="2")), "--price needs the --gpu"),
        (lambda r: cli_data.check(r, Asked(config=CONFIG, gpu="X1")), "--gpu X1 is unknown"),
        (
            lambda r: cli_data.split_data(
                r, "philosophy_conch", "data", share="ten", seed=1, replace=False, dry=True
            ),
            "--share 'ten' is no number",
        ),
        (
            lambda r: cli_data.preview(r, CONFIG, (), rows=0, first=1, mirror="default"),
            "count from 1",
        ),
    ],
)
def test_misuse_is_refused_before_any_work(
    root: Path, act: Callable[[Path], None], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        act(root)
    assert says in caught.value.message


def test_a_faulty_file_is_told_and_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    rows = [{"instruction": "q", "output": "answer"}, {"instruction": "r", "output": ""}]
    path.write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=r"data with errors: .*x\.json"):
        cli_data.check(root, Asked(file=str(path)))
    told = capsys.readouterr().out
    assert "2 rows, 2 kept, 1 errors" in told
    assert 'error: row 2, line 1: "output" is empty' in told
    assert "answers: Latin 50%, none 50%; 0 duplicates, 0 near-duplicates" in told


def test_dry_split_says_what_it_would_write(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli_data.split_data(
        root, "philosophy_conch", "data", share="0.1", seed=42, replace=False, dry=True
    )
    told = capsys.readouterr().out
    assert "would write: philosophy_conch_validation" in told
    assert "  eval_dataset: philosophy_conch_validation" in told
    assert not (root / "data/philosophy_conch_validation.json").exists()
