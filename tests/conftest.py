"""Fixtures every test may use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support import lacking
from tunesmith.project import Project

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["replica_fixtures"]
# Run inside the training environment (tests/e2e/test_training_side.py).
collect_ignore = ["training"]

# A shell that starts us in the background has Ctrl-C ignored, and so would the programs under
# test that are stopped by it; so has nohup a hang-up.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# As for every job (configs/stack.yml): on shared cores spinning threads starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Take back what the code under test sets for its own process, as the image's door does."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def project() -> Project:
    """The project of this clone."""
    return Project.at(ROOT)


@pytest.fixture
def bare(project: Project, tmp_path: Path) -> Project:
    """The project with a home of its own: no environment there, and so no extras."""
    return replace(project, home=tmp_path / "home")


@pytest.fixture(scope="session")
def training_python(project: Project) -> Path:
    """Interpreter of the training environment (Python 3.10, the cu128 lock)."""
    if named := os.environ.get("TUNESMITH_TEST_PYTHON"):
        return Path(named)
    environment = project.environment()
    if not environment.current():
        lacking(f"no training environment in {environment.path}", "`inv stack.install` makes it")
    return environment.python


@pytest.fixture(scope="session")
def base_model(project: Project, training_python: Path) -> Path:
    """Folder of the base model the e2e tests train: SmolLM2-135M-Instruct, verified."""
    if named := os.environ.get("TUNESMITH_TEST_MODEL"):
        return Path(named)
    from tunesmith.plan import build  # here, so that a unit test does not wait for the hub client

    return build.fetch_model(project, "HuggingFaceTB/SmolLM2-135M-Instruct", lambda _: None).path
