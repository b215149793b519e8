"""LLaMA-Factory's own parser takes those of its example YAMLs that our rules take."""

from __future__ import annotations

from pathlib import Path

import pytest

from example_configs import EXAMPLES, Example
from tunesmith.job.training.parser import refusal


@pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example.verdict != "refused"], ids=str
)
def test_the_parser_takes_it(example: Example, tmp_path: Path) -> None:
    values = {**example.values, "output_dir": str(tmp_path / "out"), "use_cpu": True}
    assert refusal(values) is None
