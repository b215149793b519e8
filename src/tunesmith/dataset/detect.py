"""Rows -> the entry that describes them: every column the file has and none it has not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.entry import SHARED_ROLES, TAG_DEFAULTS, TEXT_COLUMNS, Entry
from tunesmith.dataset.syntax import kind_of

# What people call the columns; the first one found in the file plays the role.
_ALPACA_NAMES = {
    "prompt": ("instruction", "prompt", "question"),
    "query": ("input", "query"),
    "response": ("output", "response", "answer", "completion"),
    "history": ("history",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    # TRL's name for it; where its values are true and false it is no class of a classifier.
    "kto_tag": ("kto_tag", "label"),
}
_MESSAGES = ("conversations", "messages")
_ROLE_KEYS = (("from", "value"), ("role", "content"))
_ROLE_NAMES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}


class _Seen:
    """What rows hold that tells their format; they are read once, a file may be long."""

    def __init__(self, values: Iterable[JsonObject]) -> None:
        self.names: dict[str, None] = {}
        self.flags: dict[str, bool] = {}  # columns that have values, all true or false
        self.keys: dict[str, set[str]] = {name: set() for name in _MESSAGES}  # of messages
        self.roles: dict[str, dict[str, set[str]]] = {name: {} for name in _MESSAGES}
        for value in values:
            self.names.update(dict.fromkeys(value))
            if "label" in value and value["label"] is not None:
                flag = isinstance(value["label"], bool)
                self.flags["label"] = flag and self.flags.get("label", True)
            for name in _MESSAGES:
                messages = value.get(name)
                if isinstance(messages, list):
                    self._look(name, messages)

    def _look(self, name: str, messages: list[Any]) -> None:
        for message in messages:
            if kind_of(message) != "object":
                continue
            self.keys[name].update(message)
            for role_key, _ in _ROLE_KEYS:
                if isinstance(role := message.get(role_key), str):
                    self.roles[name].setdefault(role_key, set()).add(role)


def detect(
    values: Iterable[JsonObject], key: str, file_name: str, formatting: str | None = None
) -> Entry:
    """Return the entry for rows; `formatting` (alpaca, sharegpt) is guessed when None.

    A column no training can do without is named by its usual name even when absent, so
    that the check of the entry tells what is missing.
    """
    seen = _Seen(values)
    names = set(seen.names)
    if not seen.flags.get("label"):
        names.discard("label")
    messages = next((name for name in _MESSAGES if seen.keys[name]), None)
    if formatting is None:
        formatting = "sharegpt" if messages else "alpaca"
    shared = {role: role for role in SHARED_ROLES if role in names}
    ranking = {"chosen", "rejected"} <= names
    other = {"ranking": True} if ranking else {}
    if formatting == "sharegpt":
        column = messages or next((name for name in _MESSAGES if name in names), _MESSAGES[0])
        columns = {"messages": column, **shared}
        for role in ("chosen", "rejected"):
            if ranking:
                columns[role] = role
        tag = next((name for name in _ALPACA_NAMES["kto_tag"] if name in names), None)
        if tag:
            columns["kto_tag"] = tag
        return Entry(key, file_name, formatting, columns, _tags(seen, column), other)
    asked = {name for called in _ALPACA_NAMES.values() for name in called}
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    if text and not names & asked:
        return Entry(key, file_name, formatting, {"prompt": text}, None, {})
    columns = {}
    unused = {"response"} if ranking else {"chosen", "rejected"}
    for role, candidates in _ALPACA_NAMES.items():
        if role in unused:
            continue
        free = (name for name in candidates if name in names and name not in columns.values())
        found = next(free, candidates[0] if role in ("prompt", "response") else None)
        if found:
            columns[role] = found
    return Entry(key, file_name, formatting, {**columns, **shared}, None, other)


def _tags(seen: _Seen, column: str) -> dict[str, str] | None:
    """Return the tags of the messages, None when they are LLaMA-Factory's defaults."""
    keys = seen.keys[column]
    role_key, content_key = next((pair for pair in _ROLE_KEYS if pair[0] in keys), _ROLE_KEYS[0])
    roles = seen.roles[column].get(role_key, set())
    tags = {"role_tag": role_key, "content_tag": content_key}
    for tag, candidates in _ROLE_NAMES.items():
        usual = candidates[0] if role_key == "from" or len(candidates) == 1 else candidates[1]
        found = next((name for name in candidates if name in roles), None)
        if found or tag in ("user_tag", "assistant_tag"):
            tags[tag] = found or usual
    return None if all(TAG_DEFAULTS[tag] == name for tag, name in tags.items()) else tags
