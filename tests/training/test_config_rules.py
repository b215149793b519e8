"""What LLaMA-Factory's own parser says to each setting of the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llamafactory.hparams import get_train_args

from settings import ACCEPTS, SETTINGS, Setting


def verdict(values: dict[str, Any], folder: Path) -> str:
    """Return the first line of its refusal, without the error's type, or that it accepts."""
    try:
        get_train_args({**values, "output_dir": str(folder / "out")})
    except (ValueError, AssertionError, ImportError, RuntimeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ACCEPTS


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_their_parser_says_what_the_table_says(setting: Setting, tmp_path: Path) -> None:
    assert verdict(setting.values, tmp_path).startswith(setting.parser)


@pytest.mark.parametrize(
    "setting", [setting for setting in SETTINGS if setting.ours != ACCEPTS], ids=str
)
def test_what_our_hints_lead_to_is_taken(setting: Setting, tmp_path: Path) -> None:
    mended = setting.mended
    if mended is not None:
        assert verdict(mended, tmp_path) == ACCEPTS
