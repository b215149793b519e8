"""What a phase reports of its own use."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tunesmith.job.system.resources import (
    growth_during,
    memory_available,
    multiplies_bf16,
    peak_memory,
)

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


def test_growth_is_what_was_held_meanwhile() -> None:
    def work() -> None:
        held = bytearray(b"x") * 80_000_000
        time.sleep(0.1)
        del held

    assert 75_000_000 < growth_during(work) < 120_000_000


def test_available_memory_is_within_the_machines() -> None:
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < memory_available() <= int(meminfo["MemTotal"].split()[0]) * 1024


@pytest.mark.parametrize(
    ("flags", "tiles"),
    [("fpu avx512_bf16 amx_bf16 avx512_fp16", True), ("fpu avx512f avx512_bf16", False)],
)
def test_bf16_wants_tiles(tmp_path: Path, flags: str, tiles: bool) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert multiplies_bf16(info) is tiles
    assert not multiplies_bf16(tmp_path / "nowhere")
