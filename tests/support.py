"""What several tests share."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(what: str, remedy: str) -> NoReturn:
    """Skip with the reason and the way to enable the test; in CI fail instead."""
    if os.environ.get("TUNESMITH_REQUIRE_ALL"):
        pytest.fail(f"{what}; {remedy}", pytrace=False)
    pytest.skip(f"{what}; {remedy}")
