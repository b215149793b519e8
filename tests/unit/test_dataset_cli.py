"""The verbs on data: what they refuse before any work, and what they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.cli import data
from tunesmith.cli.command import Session
from tunesmith.core.errors import UsageError

pytestmark = pytest.mark.unit

CONFIG = "configs/train/smollm2_135m_lora_sft.yaml"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda s: data.check.function(s, dataset="a", file="b"), "--file and --dataset both"),
        (lambda s: data.check.function(s, config="c", file="b"), "--file and --config both"),
        (lambda s: data.check.function(s, gpu="RTX4090"), "need a --config"),
        (lambda s: data.check.function(s, config=CONFIG, price="2"), "--price needs the --gpu"),
        (lambda s: data.check.function(s, config=CONFIG, gpu="X1"), "--gpu X1 is unknown"),
        (
            lambda s: data.split.function(s, "philosophy_conch", share="ten"),
            "--share 'ten' is not a number",
        ),
        (
            lambda s: data.preview.function(s, CONFIG, rows=0),
            "count from 1",
        ),
    ],
)
def test_misuse_is_refused_before_any_work(
    root: Path, act: Callable[[Session], None], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        act(Session(root, dry=True))
    assert says in caught.value.message


def test_a_faulty_file_is_told_and_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    rows = [{"instruction": "q", "output": "answer"}, {"instruction": "r", "output": ""}]
    path.write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=r"data with errors: .*x\.json"):
        data.check.function(Session(root), file=str(path))
    told = capsys.readouterr().out
    assert "2 rows, 2 kept, 1 errors" in told
    assert 'error: row 2, line 1: "output" is empty' in told
    assert "answers: Latin 50%, none 50%; 0 duplicates, 0 near-duplicates" in told


def test_dry_split_says_what_it_would_write(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.split.function(Session(root, dry=True), "philosophy_conch")
    told = capsys.readouterr().out
    assert "would write: philosophy_conch_validation" in told
    assert "  eval_dataset: philosophy_conch_validation" in told
    assert not (root / "data/philosophy_conch_validation.json").exists()


def test_registering_tells_warnings_and_the_stage(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "q", "chosen": "a", "rejected": "b"} for _ in range(2)]
    rows[1] |= {"instruction": "r", "chosen": "Tom &amp; Jerry"}
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data.register.function(
        Session(root), str(tmp_path / "pairs.json"), "pairs", dataset_dir=str(tmp_path)
    )
    told = capsys.readouterr().out
    assert "pairs -> pairs.json (alpaca, 2 rows for stage rm or dpo); 1 warnings:" in told
    assert "warning: row 2" in told
    labels = [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "r", "completion": "b", "label": True},
    ]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    data.register.function(
        Session(root), str(tmp_path / "labels.json"), "labels", dataset_dir=str(tmp_path)
    )
    told = capsys.readouterr().out
    assert "2 rows for stage kto); 1 warnings:" in told
    assert 'every "label" is true' in told
    entry = json.loads((tmp_path / "dataset_info.json").read_text())["labels"]
    assert entry["columns"] == {"prompt": "prompt", "response": "completion", "kto_tag": "label"}


def test_a_label_that_is_a_class_is_no_tag(root: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a", "label": n} for n in (0, 1)]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    data.register.function(
        Session(root), str(tmp_path / "classes.json"), "classes", dataset_dir=str(tmp_path)
    )
    entry = json.loads((tmp_path / "dataset_info.json").read_text())["classes"]
    assert "kto_tag" not in entry["columns"]
