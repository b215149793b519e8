"""What a phase reports of its own use."""

from __future__ import annotations

import sys

import pytest

from tunesmith.job.resources import peak_memory

pytestmark = pytest.mark.unit


def test_the_peak_counts_what_was_held_and_given_back() -> None:
    before = peak_memory()["ram"]
    held = bytearray(b"x") * (before + 50_000_000)  # beyond any peak so far
    size = len(held)
    del held
    assert peak_memory()["ram"] >= size


def test_a_phase_without_torch_names_no_gpu() -> None:
    assert "torch" not in sys.modules
    assert set(peak_memory()) == {"ram"}
