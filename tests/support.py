"""What several tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from tunesmith.job.run import foreign
from tunesmith.job.run.folder import RunFolder

# Each kind of fault once or twice; TUNESMITH_THOROUGH=1 has the full number of rounds.
THOROUGH = bool(os.environ.get("TUNESMITH_THOROUGH"))


def lacking(what: str, remedy: str) -> NoReturn:
    """Skip with the reason and the way to enable the test; in CI fail instead."""
    if os.environ.get("TUNESMITH_REQUIRE_ALL"):
        pytest.fail(f"{what}; {remedy}", pytrace=False)
    pytest.skip(f"{what}; {remedy}")


def as_fetched(run: Path, name: str) -> Path:
    """Return where a file of a pulled run lies with the very bytes its host has.

    What is written anew of checked fields lies beside in the host's own words.
    """
    kept = foreign.foreign_file(RunFolder(run), name)
    return kept if kept.exists() else run / name
