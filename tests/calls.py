"""Texts of tools and calls, and whether LLaMA-Factory can read each with its default format."""

from __future__ import annotations

import json
from typing import Any


def _tool(**change: Any) -> str:
    tool = {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    } | change
    return json.dumps([{key: value for key, value in tool.items() if value is not ...}])


_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
# text: whether it can be read
TOOLS: dict[str, bool] = {
    "[]": True,
    "{}": True,
    '""': True,
    _tool(): True,
    _tool(description=...): True,
    json.dumps([{"type": "function", "function": _FUNCTION}]): True,
    json.dumps([_FUNCTION, _FUNCTION]): True,
    "weather(city)": False,
    "['single quotes']": False,
    json.dumps(_FUNCTION): False,
    '"weather"': False,
    "[1]": False,
    '["weather"]': False,
    _tool(name=...): False,
    _tool(parameters=...): False,
    _tool(parameters={}): False,
    _tool(parameters={"properties": []}): False,
    json.dumps([{"type": "function"}]): False,
}
CALLS: dict[str, bool] = {
    '{"name": "f", "arguments": {}}': True,
    '{"name": "f", "arguments": {"a": 1}, "id": 7}': True,
    '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]': True,
    '<think>Let me see.\nYes.</think>{"name": "f", "arguments": {}}': True,
    "weather(Rome)": False,
    "": False,
    "null": False,
    "7": False,
    '["f"]': False,
    '{"name": "f"}': False,
    '{"arguments": {}}': False,
    '{"tool": "f", "parameters": {}}': False,
    '[{"name": "f", "arguments": {}}, {"function": "g", "args": {}}]': False,
}
