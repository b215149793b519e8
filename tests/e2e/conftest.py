"""What several tests of runs share: a tiny model, rows, a run folder."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import TINY, Job


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, training_python: Path, base_model: Path
) -> Path:
    folder = tmp_path_factory.mktemp("tiny model")
    subprocess.run([training_python, TINY, base_model, folder, "float32"], check=True)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data with a space")
    chance = random.Random(0)
    words = ["river", "stone", "lamp", "quiet", "seven", "paper", "orbit", "green", "letter"]
    rows = [
        {
            "instruction": f"Say {' '.join(chance.choices(words, k=6))}",
            "input": "",
            "output": " ".join(chance.choices(words, k=12)),
        }
        for _ in range(48)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    return folder


@pytest.fixture
def job(tmp_path: Path, training_python: Path) -> Iterator[Job]:
    made = Job(training_python, tmp_path / "runs with a space" / "run")
    yield made
    if made.folder.busy():
        made.call("stop", check=False)
        made.call("stop", check=False)
