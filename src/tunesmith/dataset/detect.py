"""Rows -> the entry that describes them: every column the file has and none it has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.dataset.entry import SHARED_ROLES, TAG_DEFAULTS, Entry
from tunesmith.dataset.scan import Row
from tunesmith.dataset.syntax import kind_of

# What people call the columns; the first one found in the file plays the role.
_ALPACA_NAMES = {
    "prompt": ("instruction", "prompt", "question"),
    "query": ("input", "query"),
    "response": ("output", "response", "answer", "completion"),
    "history": ("history",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "kto_tag": ("kto_tag",),
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


def detect(rows: Sequence[Row], key: str, file_name: str, formatting: str | None = None) -> Entry:
    """Return the entry for `rows`; `formatting` (alpaca, sharegpt) is guessed when None.

    A column no training can do without is named by its usual name even when absent, so
    that the check of the entry tells what is missing.
    """
    values = [row.value for row in rows if isinstance(row.value, dict)]
    names = {name for value in values for name in value}
    messages = next((name for name in _MESSAGES if _holds_messages(values, name)), None)
    if formatting is None:
        formatting = "sharegpt" if messages else "alpaca"
    shared = {role: role for role in SHARED_ROLES if role in names}
    ranking = {"chosen", "rejected"} <= names
    other = {"ranking": True} if ranking else {}
    if formatting == "sharegpt":
        column = messages or next((name for name in _MESSAGES if name in names), _MESSAGES[0])
        columns = {"messages": column, **shared}
        for role in ("chosen", "rejected", "kto_tag"):
            if role in names and (ranking or role == "kto_tag"):
                columns[role] = role
        tags = _tags(values, column)
        return Entry(key, file_name, formatting, columns, tags, other)
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


def _holds_messages(values: Sequence[dict[str, Any]], name: str) -> bool:
    return any(
        isinstance(value.get(name), list) and any(kind_of(m) == "object" for m in value[name])
        for value in values
    )


def _tags(values: Sequence[dict[str, Any]], column: str) -> dict[str, str] | None:
    """Return the tags of the messages, None when they are LLaMA-Factory's defaults."""
    messages = [
        message
        for value in values
        if isinstance(value.get(column), list)
        for message in value[column]
        if isinstance(message, dict)
    ]
    keys = {key for message in messages for key in message}
    role_key, content_key = next((pair for pair in _ROLE_KEYS if pair[0] in keys), _ROLE_KEYS[0])
    roles = {role for message in messages if isinstance(role := message.get(role_key), str)}
    tags = {"role_tag": role_key, "content_tag": content_key}
    for tag, names in _ROLE_NAMES.items():
        usual = names[0] if role_key == "from" or len(names) == 1 else names[1]
        found = next((name for name in names if name in roles), None)
        if found or tag in ("user_tag", "assistant_tag"):
            tags[tag] = found or usual
    return None if all(TAG_DEFAULTS[tag] == name for tag, name in tags.items()) else tags
