"""Data found again by its content: what is the same, what is another, what is left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tunesmith.job.training import dataset_cache

pytestmark = pytest.mark.unit

ROWS = [{"instruction": "Who are you?", "input": "", "output": "A lamp."}]


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; the versions of packages that this environment lacks."""
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(dataset_cache.importlib.metadata, "version", lambda name: "1.0")
    return tmp_path / "huggingface" / "datasets" / "tunesmith"


def data(folder: Path, rows: Any = ROWS, **entry: Any) -> dict[str, Any]:
    """Write a registry with `rows`, and return a config that trains on them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    # Always the same time of change.
    os.utime(folder / "rows.json", (1, 1))
    registry = {"rows": {"file_name": "rows.json", **entry}, "other": {"hf_hub_url": "a/b"}}
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    return {"dataset": "rows", "dataset_dir": str(folder)}


def test_the_same_rows_in_another_place_are_the_same(tmp_path: Path, caches: Path) -> None:
    first, again = (dataset_cache.by_content(data(tmp_path / name)) for name in ("one", "two"))
    assert first is not None
    assert first == again
    assert Path(first).parent == caches
    assert json.loads(Path(first, "rows.json").read_text()) == ROWS
    assert json.loads(Path(first, "dataset_info.json").read_text()) == {
        "rows": {"file_name": "rows.json"}
    }


def test_a_change_under_the_same_time_and_size_is_another(tmp_path: Path) -> None:
    first = dataset_cache.by_content(data(tmp_path / "data"))
    changed = [{**ROWS[0], "output": "A loom."}]
    again = dataset_cache.by_content(data(tmp_path / "data", changed))
    assert again not in (None, first)


def test_what_the_registry_says_and_who_makes_the_rows_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dataset_cache.by_content(data(tmp_path / "data"))
    columns = {"prompt": "output", "response": "instruction"}
    assert dataset_cache.by_content(data(tmp_path / "data", columns=columns)) not in (None, first)
    monkeypatch.setattr(dataset_cache.importlib.metadata, "version", lambda name: "2.0")
    assert dataset_cache.by_content(data(tmp_path / "data")) not in (None, first)


def test_rows_that_other_code_of_ours_has_made_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dataset_cache.by_content(data(tmp_path / "data"))
    (tmp_path / "datasets.py").write_text("another version\n")
    monkeypatch.setattr(dataset_cache.datasets, "__file__", str(tmp_path / "datasets.py"))
    assert dataset_cache.by_content(data(tmp_path / "data")) not in (None, first)


def test_rows_to_validate_on_count_too(tmp_path: Path) -> None:
    config = data(tmp_path / "data")
    (tmp_path / "data" / "more.json").write_text("[]")
    registry = {name: {"file_name": f"{name}.json"} for name in ("rows", "more")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))
    one, two = (
        dataset_cache.by_content(config | extra) for extra in ({}, {"eval_dataset": "more"})
    )
    assert None not in (one, two)
    assert one != two
    assert Path(str(two), "more.json").is_symlink()


@pytest.mark.parametrize(
    "key",
    [
        {"tokenized_path": "there"},
        {"streaming": True},
        {"dataset": "other"},
        {"dataset": "none"},
        {"dataset_dir": "ONLINE"},
        {"dataset_dir": "REMOTE:a/b"},
    ],
)
def test_what_is_no_file_here_is_left_alone(tmp_path: Path, key: dict[str, Any]) -> None:
    assert dataset_cache.by_content(data(tmp_path / "data") | key) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"columns": {"images": "pictures"}},
        {"script_url": "x"},
        {"file_name": "../rows.json"},
        {"file_name": "folder"},
    ],
)
def test_media_scripts_and_folders_are_left_alone(tmp_path: Path, entry: dict[str, Any]) -> None:
    (tmp_path / "data" / "folder").mkdir(parents=True)
    (tmp_path / "rows.json").write_text("[]")
    assert dataset_cache.by_content(data(tmp_path / "data", **entry)) is None
