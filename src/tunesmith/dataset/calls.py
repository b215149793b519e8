"""Tools that a row offers and functions that its answers call, as LLaMA-Factory 0.9.3 reads them.

Source: FunctionFormatter and ToolFormatter (data/formatter.py) and the tool formats
(data/tool_utils.py). A fault stops the whole training there, after the model was loaded and
without a row's number.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tunesmith.dataset.syntax import told

_THOUGHT = re.compile(r"<think>(.*)</think>", re.DOTALL)
_CALL = '[{"name": "...", "arguments": {...}}]'
_TOOL = (
    '[{"name": "...", "description": "...", "parameters": {"type": "object", "properties": {}}}]'
)
# What others call the two keys of a call.
_OTHERS = {"tool": "name", "function": "name", "parameters": "arguments", "args": "arguments"}


def tools_fault(text: str) -> tuple[str, str] | None:
    """Return (message, fix) for a list of tools that cannot be read; None for one that can.

    A text that is empty offers no tools.
    """
    if not text:
        return None
    tools = _parsed(text)
    if tools is _NO_JSON:
        return "is not JSON", f"write the tools as a JSON list in a string: {_TOOL}"
    if tools in ([], {}, ""):
        return None
    if not isinstance(tools, list):
        return f"is {told(tools)}, not a list of tools", f"write {_TOOL}"
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            return f"tool {number} is {told(tool)}, not an object", f"write {_TOOL}"
        inner = tool.get("function") if tool.get("type") == "function" else tool
        if not isinstance(inner, dict):
            return f'tool {number} has no object under "function"', f"write {_TOOL}"
        if not isinstance(inner.get("name"), str):
            return f'tool {number} has no "name"', "name the function"
        parameters = inner.get("parameters")
        if not isinstance(parameters, dict) or not isinstance(parameters.get("properties"), dict):
            fix = 'add "parameters": {"type": "object", "properties": {}}'
            return f'tool {number} ({inner["name"]}) has no "parameters" with "properties"', fix
    return None


def call_fault(text: str) -> tuple[str, str] | None:
    """Return (message, fix) for a function call that cannot be read; None for one that can.

    A call is a JSON object or a list of them; a thought in <think></think> may stand beside it.
    """
    thought = _THOUGHT.search(text)
    calls = _parsed(text.replace(thought.group(0), "") if thought else text)
    if calls is _NO_JSON:
        return "is not JSON", f"write the call as {_CALL}"
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict):
            return f"calls {told(call)}, not an object", f"write {_CALL}"
        missing = [key for key in ("name", "arguments") if key not in call]
        if missing:
            wrong = [key for key in call if _OTHERS.get(key) in missing]
            found = ", ".join(f'"{key}"' for key in call) or "nothing"
            fix = "; ".join(f'rename "{key}" to "{_OTHERS[key]}"' for key in wrong)
            wanted = " and ".join(f'"{key}"' for key in missing)
            verb = "are" if len(missing) > 1 else "is"
            return f"has {found} where {wanted} {verb} read", fix or f"write {_CALL}"
    return None


_NO_JSON = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NO_JSON
