"""The table of guards: what each protects, how it is switched off, which test must then fail.

A guard is switched off by one edit of one file, in a copy of the repository: nothing in the
product knows of it, and any kind of file may hold a guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Guard:
    """One guard. `file` is relative to the repository's root, `test` is a pytest node id; `old`
    occurs once in the file and becomes `new`. `training`: the test needs the training environment,
    and takes its time: it is run with all guards only."""

    table: str
    name: str
    protects: str
    file: str
    old: str
    new: str
    test: str
    training: bool = False

    def off(self, text: str) -> str:
        """Return the file's text without the guard. Raises ValueError when it is not there."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.table}: {self.name}: {self.file} has its text {found} times")
        return text.replace(self.old, self.new)


def load() -> list[Guard]:
    """Return every guard of the tables beside this file, in order."""
    return [_guard(path, row) for path in sorted(HERE.glob("*.yml")) for row in _rows(path)]


def _rows(path: Path) -> list[dict[str, object]]:
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(rows, list), f"{path.name}: a table is a list of guards"
    return rows


def _guard(path: Path, row: dict[str, object]) -> Guard:
    keys = {"guard", "protects", "file", "edit", "test"}
    assert keys <= row.keys() <= keys | {"training"}, f"{path.name}: {sorted(row)}"
    edit = row["edit"]
    assert isinstance(edit, dict), f"{path.name}: {row['guard']}: edit"
    assert edit.keys() == {"old", "new"}, f"{path.name}: {row['guard']}: edit"
    return Guard(
        table=path.name,
        name=str(row["guard"]),
        protects=str(row["protects"]),
        file=str(row["file"]),
        old=str(edit["old"]),
        new=str(edit["new"]),
        test=str(row["test"]),
        training=bool(row.get("training", False)),
    )
