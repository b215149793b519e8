"""What nvidia-smi prints, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.job.system.gpu import Gpu, Sampler, ask, parse

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def test_figures_and_gaps() -> None:
    text = "NVIDIA H100 80GB HBM3, 1234, 81559, 97, 45\nTesla V, [N/A], 16384, 0, [Not Supported]\n"
    assert parse(text) == (
        Gpu("NVIDIA H100 80GB HBM3", 1234 * MIB, 81559 * MIB, 97, 45),
        Gpu("Tesla V", None, 16384 * MIB, 0, None),
    )
    assert parse("") == ()
    assert parse("No devices were found\n") == ()


def test_no_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask() == ()
    sampler = Sampler()
    sampler.start()
    assert sampler.newest() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Unknown Error'; exit 255\n")
    program.chmod(0o755)
    assert ask() == ()
    program.write_text("#!/bin/sh\nexec /bin/sleep 20\n")
    assert ask(timeout=0.2) == ()
