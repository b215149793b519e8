"""Tests that run inside the training environment: tests/training, all in one process there.

Its imports take seconds. Of the files, those are run that this session has selected.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import training_side

pytestmark = pytest.mark.e2e

_FOLDER = Path(__file__).resolve().parents[1] / "training"
# The first one looks at the libraries as nobody has used them yet.
FILES = sorted(_FOLDER.glob("test_*.py"), key=lambda file: (file.stem != "test_patches", file.stem))


@pytest.fixture(scope="module")
def failures(
    request: pytest.FixtureRequest,
    training_python: Path,
    base_model: Path,
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[str]]:
    """What failed in each file, with "" for each test that passed."""
    selected = {item.name for item in request.session.items if item.path == Path(__file__)}
    files = [file for file in FILES if f"{test_of_a_file.__name__}[{file.stem}]" in selected]
    scratch = tmp_path_factory.mktemp("training side")
    python = training_side.overlay(training_python, root, scratch / "env")
    variables = {"TUNESMITH_TEST_MODEL": str(base_model)}
    found = training_side.run(python, root, files, scratch, variables)
    shutil.rmtree(scratch)  # gigabytes, and pytest keeps the folders of three sessions
    return found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_of_a_file(failures: dict[str, list[str]], file: Path) -> None:
    results = failures[file.stem]
    assert not any(results), "\n".join(filter(None, results))
