"""Broken configs that only LLaMA-Factory's parser refuses: its sentence, the key, a change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from broken_configs import BROKEN, Broken
from tunesmith.job.training.parser import refusal


def values(text: str, folder: Path) -> dict[str, Any]:
    """Return a config as a run on this machine has it."""
    return {**yaml.safe_load(text), "output_dir": str(folder / "out"), "use_cpu": True}


@pytest.mark.parametrize("row", [row for row in BROKEN if row.layer == "parser"], ids=str)
def test_the_parser_s_sentence_is_told_with_key_and_change(row: Broken, tmp_path: Path) -> None:
    began = time.process_time()
    found = refusal(values(row.text, tmp_path))
    assert time.process_time() - began < 20
    assert found is not None
    assert row.says in found.message
    assert "\n" not in found.message + found.hint
    assert [words for words in row.named if words not in found.hint] == []


@pytest.mark.parametrize("row", BROKEN, ids=str)
def test_the_parser_takes_what_the_change_makes(row: Broken, tmp_path: Path) -> None:
    assert refusal(values(row.mended, tmp_path)) is None


def test_a_kernel_that_is_not_there_is_refused_although_their_parser_takes_it(
    tmp_path: Path,
) -> None:
    found = refusal(values("flash_attn: fa2\n" + BROKEN[0].mended, tmp_path))
    assert found is not None
    assert found.message.startswith("`flash_attn`: fa2 cannot be used here")
    assert found.hint == "write `flash_attn: auto`"
