"""Tools and function calls, judged as LLaMA-Factory's formatters judge them."""

from __future__ import annotations

import pytest

from calls import CALLS, TOOLS
from tunesmith.dataset.calls import call_fault, tools_fault


@pytest.mark.parametrize(("text", "good"), TOOLS.items())
def test_tools(text: str, good: bool) -> None:
    assert (tools_fault(text) is None) == good


@pytest.mark.parametrize(("text", "good"), CALLS.items())
def test_calls(text: str, good: bool) -> None:
    assert (call_fault(text) is None) == good


def test_no_tools_are_no_fault() -> None:
    assert tools_fault("") is None


def test_keys_of_other_tools_are_renamed() -> None:
    assert call_fault('{"tool": "f", "parameters": {}}') == (
        'has "tool", "parameters" where "name" and "arguments" are read',
        'rename "tool" to "name"; rename "parameters" to "arguments"',
    )


def test_a_text_as_deep_as_one_likes_is_no_json() -> None:
    fault = tools_fault("[" * 200_000)
    assert fault is not None
    assert fault[0] == "is not JSON"
