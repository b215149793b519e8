"""Exports of other tools, made the rows that LLaMA-Factory reads.

Each reader takes one row or document as it was exported and yields rows; what it leaves out or
changes it says to `note`, once for each row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tunesmith.core.callbacks import OnText
from tunesmith.core.documents import JsonObject

Row = JsonObject

_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "developer": "system"}
_LABELS, _PROMPTS = ("kto_tag", "label"), ("prompt", "instruction", "question")
_ANSWERS = ("completion", "output", "response", "answer")
_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_HUMAN = "Human:"
_ASKS, _REPLIES = ("human", "observation"), ("gpt", "function_call")


def kind_of(first: Any) -> str | None:
    """Return which export the first row of a file is of; None for none that is known."""
    if not isinstance(first, Mapping):
        return None
    if isinstance(first.get("mapping"), Mapping):
        return "ChatGPT"
    if isinstance(first.get("data"), Mapping) and "annotations" in first:
        return "Label Studio"
    messages = first.get("messages")
    if isinstance(messages, list) and all(isinstance(m, Mapping) for m in messages):
        return "OpenAI"
    if isinstance(first.get("chosen"), list) and isinstance(first.get("rejected"), list):
        return "preference messages"
    # A label of 1 may be a class; beside TRL's other names it is none.
    plain = str(first.get(_found(first, _LABELS))).casefold() in ("true", "false")
    if {"prompt", "completion", "label"} <= first.keys() or (plain and _found(first, _ANSWERS)):
        return "KTO"
    if isinstance(first.get("chosen"), str) and _HUMAN in str(first["chosen"]):
        return "HH dialogues"
    return None


def from_openai(row: JsonObject, note: OnText) -> Iterator[Row]:
    """A conversation in OpenAI's format: parts of content, tool calls, weights."""
    turns: list[dict[str, str]] = []
    for message in row.get("messages", ()):
        if message.get("weight") == 0:
            # What follows may refer to it, and what is before it ends with a question.
            note("turns from the first of weight 0 on were left out")
            break
        turns += _turns_of(message, note)
    tools = row.get("tools")
    extra = {"tools": json.dumps(tools, ensure_ascii=False)} if tools else {}
    yield from _conversation(turns, extra, note)


def from_chatgpt(document: JsonObject, note: OnText) -> Iterator[Row]:
    """A conversation of ChatGPT's data export: a tree, of which the shown branch is taken."""
    nodes = document.get("mapping", {})
    branch: list[JsonObject] = []
    name, seen = document.get("current_node"), set()
    while isinstance(name, str) and name in nodes and name not in seen:
        seen.add(name)
        node = nodes[name]
        if isinstance(node.get("message"), Mapping):
            branch.append(node["message"])
        name = node.get("parent")
    turns: list[dict[str, str]] = []
    for message in reversed(branch):
        role = (message.get("author") or {}).get("role")
        content = message.get("content") or {}
        if role not in ("user", "assistant"):
            continue
        if content.get("content_type") not in ("text", "multimodal_text"):
            note(f"a turn of kind {content.get('content_type')} was left out")
            continue
        turns += _turns_of({"role": role, "content": content.get("parts")}, note)
    yield from _conversation(turns, {}, note)


def from_label_studio(task: JsonObject, note: OnText) -> Iterator[Row]:
    """A task of Label Studio: its first text, and the text that was written for it."""
    data = task.get("data") or {}
    names = ("prompt", "question", "instruction", "text")
    asked = next((data[name] for name in names if data.get(name)), "")
    for annotation in task.get("annotations") or ():
        if annotation.get("was_cancelled"):
            note("a task that was skipped was left out")
            continue
        written = [
            "\n".join(result["value"]["text"])
            if isinstance(result["value"]["text"], list)
            else str(result["value"]["text"])
            for result in annotation.get("result") or ()
            if isinstance(result.get("value"), Mapping) and "text" in result["value"]
        ]
        if asked and written:
            yield {"instruction": str(asked), "input": "", "output": written[0]}
        else:
            note("a task without a text or without a written answer was left out")


def from_preference(row: JsonObject, note: OnText) -> Iterator[Row]:
    """A pair whose answers are conversations (TRL): what both begin with, then one message each."""
    chosen, rejected = list(row["chosen"]), list(row["rejected"])
    before = list(row["prompt"]) if isinstance(row.get("prompt"), list) else []
    if not before:
        while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
            before.append(chosen.pop(0))
            rejected.pop(0)
    turns = [turn for message in before for turn in _turns_of(message, note)]
    ends = [
        [turn for message in answer for turn in _turns_of(message, note)]
        for answer in (chosen, rejected)
    ]
    if not turns or turns[-1]["from"] not in _ASKS or any(len(end) != 1 for end in ends):
        note("a pair that is not one question with two answers was left out")
        return
    yield {"conversations": turns, "chosen": ends[0][0], "rejected": ends[1][0]}


def from_kto(row: JsonObject, note: OnText) -> Iterator[Row]:
    """A prompt, a completion and whether it is wanted: true, false, or a word or number for it."""
    held = row.get(_found(row, _LABELS))
    label = _label(held)
    if label is None:
        note(f"a row whose label is {held!r} was left out")
        return
    if not isinstance(held, bool):
        note("labels became true and false")
    asked, answer = row.get(_found(row, _PROMPTS)), row.get(_found(row, _ANSWERS))
    if isinstance(asked, list) and isinstance(answer, list):
        turns = [turn for message in (*asked, *answer) for turn in _turns_of(message, note)]
        for made in _conversation(turns, {}, note):
            yield {**made, "kto_tag": label}
        return
    yield {"instruction": asked, "input": "", "output": answer, "kto_tag": label}


def from_hh(row: JsonObject, note: OnText) -> Iterator[Row]:
    """A pair of dialogues written as text (HH-RLHF): what both begin with, then an answer each."""
    chosen, rejected = _dialogue(str(row["chosen"])), _dialogue(str(row.get("rejected")))
    before: list[dict[str, str]] = []
    while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
        before.append(chosen.pop(0))
        rejected.pop(0)
    ends = [end for end in (chosen, rejected) if len(end) == 1 and end[0]["from"] == "gpt"]
    if len(ends) != 2 or not before or before[-1]["from"] != "human":
        note("a pair that is not one question with two answers was left out")
        return
    yield {"conversations": before, "chosen": ends[0][0], "rejected": ends[1][0]}


def _dialogue(text: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())[1:]
    sides = {"Human": "human", "Assistant": "gpt"}
    return [
        {"from": sides[side], "value": said.strip()}
        for side, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _found(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return the first of `names` that a row has; "" for none."""
    return next((name for name in names if name in row), "")


def _label(held: Any) -> bool | None:
    if isinstance(held, str):
        return _WORDS.get(held.strip().casefold())
    return bool(held) if held in (0, 1) and held is not None else None


READERS: Mapping[str, Callable[[Any, OnText], Iterator[Row]]] = {
    "ChatGPT": from_chatgpt,
    "Label Studio": from_label_studio,
    "OpenAI": from_openai,
    "preference messages": from_preference,
    "KTO": from_kto,
    "HH dialogues": from_hh,
}


def _turns_of(message: JsonObject, note: OnText) -> Iterator[dict[str, str]]:
    role, text = message.get("role"), _text_of(message.get("content"), note)
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        text = f"<think>\n{reasoning}\n</think>\n\n{text}"
    calls = message.get("tool_calls") or (
        [{"function": message["function_call"]}] if message.get("function_call") else []
    )
    if calls:
        if text.strip():
            note("the words beside a call of functions were left out")
        yield {"from": "function_call", "value": json.dumps(_calls(calls), ensure_ascii=False)}
    elif role in ("tool", "function"):
        yield {"from": "observation", "value": text}
    elif role in _ROLES:
        if text.strip() or role == "user":
            yield {"from": _ROLES[role], "value": text}
    else:
        note(f"a message from {role!r} was left out")


def _calls(calls: list[Any]) -> list[JsonObject]:
    made = []
    for call in calls:
        function = call.get("function") or {}
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = {"text": arguments}
        made.append({"name": str(function.get("name")), "arguments": arguments})
    return made


def _text_of(content: Any, note: OnText) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            note("a part of a message that is no text was left out")
    return "\n".join(parts)


def _conversation(turns: list[dict[str, str]], extra: Row, note: OnText) -> Iterator[Row]:
    """Yield one row: questions and answers in turn, from the first question to the last answer."""
    joined: list[dict[str, str]] = []
    for turn in turns:
        alike = _ASKS if turn["from"] in _ASKS else _REPLIES
        if joined and turn["from"] == "system" != joined[0]["from"]:
            note("a system message inside a conversation was left out")
        elif joined and joined[-1]["from"] == turn["from"] and turn["from"] in ("human", "gpt"):
            note("messages of one side that follow one another were joined")
            joined[-1] = {**turn, "value": f"{joined[-1]['value']}\n\n{turn['value']}"}
        elif not [t for t in joined if t["from"] != "system"] and alike is not _ASKS:
            if turn["from"] == "system":
                joined.append(turn)
            else:
                note("an answer before the first question was left out")
        else:
            joined.append(turn)
    while joined and joined[-1]["from"] not in _REPLIES:
        note("a question without an answer at the end was left out")
        joined.pop()
    if any(turn["from"] in _REPLIES for turn in joined):
        yield {"conversations": joined, **extra}
