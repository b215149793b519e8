"""A split is the same everywhere, keeps alike rows together, and is whole or absent."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.registry import load_registry, register
from tunesmith.dataset.split import Split, split

pytestmark = pytest.mark.unit


def rows(count: int = 100) -> list[dict[str, Any]]:
    generator = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz "
    return [
        {"instruction": f"question {n}", "output": "".join(generator.choices(letters, k=120))}
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set.json").write_text(json.dumps(rows()))
    register(tmp_path, "set", tmp_path / "set.json")
    return tmp_path


def read(made: Split) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    train, validation = (
        json.loads(part.file.read_text(encoding="utf-8")) for part in (made.train, made.validation)
    )
    return train, validation


def test_rows_are_parted_and_registered(folder: Path) -> None:
    made = split(folder, "set", 0.1, 42)
    train, validation = read(made)
    assert (len(train), len(validation), made.joined) == (90, 10, 0)
    assert sorted(train + validation, key=str) == sorted(rows(), key=str)
    entries = load_registry(folder)
    assert list(entries) == ["set", "set_train", "set_validation"]
    assert entries["set_train"].columns == entries["set"].columns
    assert sorted(p.name for p in folder.iterdir()) == [
        "dataset_info.json",
        "set.json",
        "set_train.json",
        "set_validation.json",
    ]


def test_order_of_rows_and_further_rows_change_no_side(folder: Path) -> None:
    _, before = read(split(folder, "set", 0.1, 42))
    shuffled = rows()
    random.Random(5).shuffle(shuffled)
    (folder / "set.json").write_text(json.dumps(shuffled))
    _, same = read(split(folder, "set", 0.1, 42, replace_files=True))
    assert sorted(map(str, before)) == sorted(map(str, same))
    (folder / "set.json").write_text(json.dumps(rows(110)))
    _, more = read(split(folder, "set", 0.1, 42, replace_files=True))
    assert len(more) == 11
    assert len([row for row in before if row in more]) >= 9
    _, other = read(split(folder, "set", 0.1, 43, replace_files=True))
    assert sorted(map(str, other)) != sorted(map(str, more))


def test_alike_rows_stay_together(folder: Path) -> None:
    data = rows(60)
    data += [{**row, "output": "another answer"} for row in data[:20]]  # the same question
    data += [
        {"instruction": row["instruction"] + "!", "output": row["output"]} for row in data[20:40]
    ]
    (folder / "set.json").write_text(json.dumps(data))
    for seed in range(5):
        made = split(folder, "set", 0.3, seed, replace_files=True)
        train, validation = read(made)
        assert (len(validation), made.joined) == (30, 40)
        asked = {row["instruction"].rstrip("!") for row in validation}
        assert asked.isdisjoint(row["instruction"].rstrip("!") for row in train)


def test_again_changes_nothing(folder: Path) -> None:
    first = split(folder, "set", 0.1, 42)
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    again = split(folder, "set", 0.1, 42)
    assert (first.changed, again.changed) == (True, False)
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == times


def test_lines_stay_lines_and_absent_columns_are_written(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    data = [row | ({"input": "more"} if n == 0 else {}) for n, row in enumerate(rows(20))]
    path.write_text("\n".join(map(json.dumps, data)))
    register(tmp_path, "set", path)
    made = split(tmp_path, "set", 0.5, 1)
    for part in (made.train, made.validation):
        assert part.file.suffix == ".jsonl"
        for line in part.file.read_text().splitlines():
            assert "input" in json.loads(line)


def test_a_part_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    data = [
        {"instruction": f"q{n}", "output": f"2024-05-{n:02}" if n else "text"} for n in range(20)
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, data)))
    register(tmp_path, "set", tmp_path / "set.jsonl")
    with pytest.raises(UsageError, match="turns into a timestamp"):
        split(tmp_path, "set", 0.1, 42)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", "set.jsonl"]


def test_dry_writes_nothing(folder: Path) -> None:
    made = split(folder, "set", 0.1, 42, dry=True)
    assert (made.train.rows, made.validation.rows, made.changed) == (90, 10, False)
    assert len(list(folder.iterdir())) == 2


def faulty(folder: Path) -> None:
    (folder / "set.json").write_text('[{"instruction": "q", "output": ""}]')


def alike(folder: Path) -> None:
    (folder / "set.json").write_text(
        json.dumps([rows(1)[0] | {"output": f"{n}"} for n in range(9)])
    )


def taken(folder: Path) -> None:
    (folder / "set_validation.json").write_text("[]")


def named(folder: Path) -> None:
    register(folder, "set_train", folder / "set.json")


@pytest.mark.parametrize(
    ("prepare", "key", "share", "says"),
    [
        (None, "set", 0.0, "between 0 and 1"),
        (None, "set", 1.0, "between 0 and 1"),
        (None, "other", 0.1, "not registered"),
        (faulty, "set", 0.1, '"output" is empty'),
        (alike, "set", 0.1, "cannot be split"),
        (taken, "set", 0.1, "set_validation.json exists with other rows"),
        (named, "set", 0.1, "set_train is registered for set.json"),
    ],
)
def test_refusal_writes_nothing(
    folder: Path, prepare: Callable[[Path], None] | None, key: str, share: float, says: str
) -> None:
    if prepare:
        prepare(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError) as caught:
        split(folder, key, share, 42)
    assert says in caught.value.line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
