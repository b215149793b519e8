"""What several contract tests share: an agent in a folder of its own, a hub with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents import Agent
from hubserver import Hub, tiny_model


@pytest.fixture
def agent(tmp_path: Path, root: Path) -> Iterator[Agent]:
    asked = Agent(Path(sys.executable), tmp_path, root / "configs")
    yield asked
    asked.end_all()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.add("org/tiny", tiny_model())
        yield running
