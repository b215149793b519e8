"""Which tools and calls LLaMA-Factory's formatters can read: the truth behind dataset/calls.py."""

from __future__ import annotations

import pytest
from llamafactory.data.formatter import FunctionFormatter, ToolFormatter

from calls import CALLS, TOOLS


def reads(formatter: FunctionFormatter | ToolFormatter, text: str) -> bool:
    try:
        formatter.apply(content=text)
    except (RuntimeError, KeyError, TypeError, AttributeError):
        return False
    return True


@pytest.mark.parametrize(("text", "good"), TOOLS.items())
def test_tools(text: str, good: bool) -> None:
    assert reads(ToolFormatter(tool_format="default"), text) == good


@pytest.mark.parametrize(("text", "good"), CALLS.items())
def test_calls(text: str, good: bool) -> None:
    assert reads(FunctionFormatter(slots=["{{content}}"], tool_format="default"), text) == good
