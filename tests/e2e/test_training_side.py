"""Tests that run inside the training environment: tests/training, each file by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import training_side

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).resolve().parents[1] / "training"


@pytest.fixture(scope="module")
def python(training_python: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_side.overlay(training_python, root, tmp_path_factory.mktemp("side") / "env")


@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_in_the_training_environment(python: Path, root: Path, file: Path) -> None:
    training_side.run(python, root, file)
