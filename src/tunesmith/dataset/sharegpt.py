"""What holds for a row of messages.

Source: SharegptDatasetConverter (data/converter.py) and the first filter of the
processors (data/processor/*.py) of LLaMA-Factory 0.9.3. After an optional system
message, questions (user, observation) and answers (assistant, function) take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.calls import call_fault, tools_fault
from tunesmith.dataset.columns import Rules, SourcePosition, misspelt, similar, text_fault
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding, Severity
from tunesmith.dataset.scan import Row
from tunesmith.dataset.syntax import kind_of, quoted, show, told

_ALIASES = {"user": "human", "human": "user", "assistant": "gpt", "gpt": "assistant"}


class SharegptRules(Rules):
    """Check each row, piece by piece; `key_faults` tells at the end what no message has.

    `again` is the command that registers the file again with the tags it has.
    """

    def __init__(self, entry: Entry, stage: str, again: str) -> None:
        super().__init__()
        self._entry, self._stage, self._again = entry, stage, again
        self._column = entry.column("messages") or ""
        self._known = {name for role in entry.used_roles() if (name := entry.column(role))}
        self._absent = [role for role in ("role_tag", "content_tag") if entry.tag(role)]
        self._first: tuple[SourcePosition, list[str]] | None = None
        # Tags given without these two: LLaMA-Factory looks for the key None and stops.
        self._systems: set[str] = set()
        self._told_keys: set[str] = set()
        self._nameless = None in (entry.tag("role_tag"), entry.tag("content_tag"))

    def add(self, piece: Piece) -> Iterator[Finding]:
        """Yield what is wrong with the rows of a piece."""
        entry, column = self._entry, self._column
        content_key = entry.tag("content_tag") or ""
        for row in piece.rows:
            if not isinstance(row.value, dict):
                continue
            if self._absent:
                self._look_for_keys(row, piece.file)
            faulty = False
            for fault in self._row_faults(row, piece.file):
                faulty = faulty or fault.severity == "error"
                yield fault
            messages = row.value.get(column)
            listed = messages if isinstance(messages, list) else None
            sound = listed is not None and all(isinstance(m, dict) for m in listed)
            self.stops = self.stops or not sound or (self._nameless and bool(messages))
            if sound and listed is not None:
                self._systems.add(kind_of(self._system_of(row.value, listed)))
                self.stops = self.stops or len(self._systems - {"null"}) > 1
            self.kept += sound and _keeps(row.value, entry, self._stage, column)
            if not faulty and messages:
                lengths = [len(message[content_key]) for message in messages]
                if not entry.ranking:
                    self.answer_lengths.append(lengths.pop())
                self.prompt_lengths.append(sum(lengths))

    def key_faults(self) -> Iterator[Finding]:
        """Yield message keys that no message of the file has: LLaMA-Factory raises KeyError."""
        if self._first is None:
            return
        place, keys = self._first
        for role in self._absent:
            key = self._entry.tag(role)
            text = f'no message has the key "{key}" ({role}); the first has {", ".join(keys)}'
            fix = f"name the keys it has: {self._again}"
            yield Finding(
                "error", text, fix, place.row, place.line, field=self._column, file=place.file
            )

    def _system_of(self, value: JsonObject, messages: list[JsonObject]) -> Any:
        """Return what the converter takes for the system message; one kind must do for all."""
        entry = self._entry
        role, tag = entry.tag("role_tag") or "", entry.tag("system_tag")
        if tag and messages and messages[0].get(role) == tag:
            return messages[0].get(entry.tag("content_tag") or "")
        column = entry.column("system")
        return value.get(column) if column else ""

    def _unread_keys(self, messages: list[Any], row: Row, file: str | None) -> Iterator[Finding]:
        """Yield what a message says under a key that LLaMA-Factory does not read.

        A call that is lost is an error: the answer without it would be trained. Of other keys
        each is named once, with the first row that has it.
        """
        tag = self._entry.tag("function_tag")
        read = {self._entry.tag("role_tag"), self._entry.tag("content_tag")}
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict):
                continue
            for key in message:
                if key in read:
                    continue
                if key in ("tool_calls", "function_call") and _lost_call(message):
                    fix = f'write it as a message from "{tag or "function_call"}", its call as JSON'
                    severity: Severity = "error"
                elif key in _UNREAD and key not in self._told_keys and _matters(key, message[key]):
                    self._told_keys.add(key)
                    fix, severity = _UNREAD[key], "warning"
                else:
                    continue
                text = f'"{key}" of message {number} is not read by LLaMA-Factory'
                yield Finding(
                    severity, text, fix, row.number, row.line, field=self._column, file=file
                )

    def _look_for_keys(self, row: Row, file: str | None) -> None:
        messages = row.value.get(self._column)
        for message in messages if isinstance(messages, list) else ():
            if not isinstance(message, dict):
                continue
            if self._first is None:
                self._first = (SourcePosition(row.number, row.line, file), list(message))
            self._absent = [role for role in self._absent if self._entry.tag(role) not in message]

    def _row_faults(self, row: Row, file: str | None) -> Iterator[Finding]:
        value, entry, stage, column = row.value, self._entry, self._stage, self._column

        def error(message: str, fix: str, field: str = column) -> Finding:
            return Finding("error", message, fix, row.number, row.line, field=field, file=file)

        for role in ("system", "tools"):
            name = entry.column(role)
            if name and (fault := text_fault(value, name)):
                yield error(fault, quoted(value[name]), name)
            elif role == "tools" and name and (wrong := tools_fault(value.get(name) or "")):
                yield error(f'"{name}" {wrong[0]}', wrong[1], name)
        messages = value.get(column)
        if messages is None:
            near = misspelt(value, column, self._known)
            fix = f'rename "{near}"' if near else "add the messages or delete the row"
            yield error(f'no "{column}"', fix)
        elif not isinstance(messages, list):
            yield error(f'"{column}" is {told(messages)}', "write a list of messages")
        elif not messages:
            yield error(f'"{column}" is an empty list', "add the messages or delete the row")
        else:
            for message, fix in _message_faults(messages, entry):
                yield error(message, fix)
            yield from self._unread_keys(messages, row, file)
        if entry.ranking:
            for role in ("chosen", "rejected"):
                name = entry.column(role)
                if name and not isinstance(value.get(name), dict):
                    yield error(f'"{name}" is not a message', "write one message object", name)
        tag = entry.column("kto_tag")
        if stage == "kto" and tag and not isinstance(value.get(tag), bool):
            yield error(f'"{tag}" is not true or false', "write true or false", tag)


_UNREAD = {
    "weight": "a turn of weight 0 is trained like all: delete the row, or the turns from it on",
    "loss": "every answer is trained: with `mask_history: true` the last alone",
    "train": "every answer is trained: with `mask_history: true` the last alone",
    "reasoning_content": 'put it before the answer as "<think>...</think>"',
    "reasoning": 'put it before the answer as "<think>...</think>"',
    "images": "name the pictures in a column of the row",
}


def _matters(key: str, held: Any) -> bool:
    """Whether something is lost with a key: of a weight or a loss only what is not the rule."""
    if key in ("weight", "loss", "train"):
        return held is not None and not held
    return held is not None


def _lost_call(message: JsonObject) -> bool:
    """Whether a message calls functions as OpenAI's format does."""
    return bool(message.get("tool_calls") or message.get("function_call"))


def _message_faults(messages: list[Any], entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield (message, fix): all faults of keys and values, the first of order."""
    role_key, content_key = entry.tag("role_tag") or "", entry.tag("content_tag") or ""
    asks = _named(entry, "user_tag", "observation_tag")
    replies = _named(entry, "assistant_tag", "function_tag")
    system, calls = _named(entry, "system_tag"), _named(entry, "function_tag")
    sound = True
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            yield f"message {number} is {told(message)}, not an object", "write an object"
            sound = False
            continue
        role, content = message.get(role_key), message.get(content_key)
        if role is None:
            yield f'message {number} has no "{role_key}"', f"add it: {' or '.join(asks + replies)}"
            sound = False
        elif role not in asks + replies + system:
            yield _unknown_role(number, role, asks + replies + system)
            sound = False
        if not isinstance(content, str):
            found = "no" if content is None else f"{told(content)} as"
            yield f'message {number} has {found} "{content_key}"', "write a string"
        elif not content.strip() and role in replies:
            yield f"message {number}, an answer, is empty", "write the answer or delete the row"
        elif role in calls and (wrong := call_fault(content)):
            yield f"message {number} ({role}) {wrong[0]}", wrong[1]
    if not sound:
        return
    roles = [message[role_key] for message in messages]
    first = 2 if roles[0] in system else 1
    for number, role in enumerate(roles[first - 1 :], first):
        expected = asks if (number - first) % 2 == 0 else replies
        if role not in expected:
            message = f'message {number} is from "{role}"'
            message += f" where {' or '.join(expected)} has the turn"
            yield message, "let questions and answers take turns, or delete the row"
            return
    if (len(roles) - first + 1) % 2 != (1 if entry.ranking else 0):
        if entry.ranking:
            yield "the messages do not end with a question", "delete the last message"
        else:
            yield "the last question has no answer", "add the answer or delete the last message"
    elif len(roles) < first:
        yield "only a system message", "add a question and its answer"


def _unknown_role(number: int, role: Any, known: tuple[str, ...]) -> tuple[str, str]:
    meant = None
    if isinstance(role, str):
        meant = next((name for name in known if similar(role, name)), None)
        if meant is None and _ALIASES.get(role.casefold()) in known:
            meant = _ALIASES[role.casefold()]
    message = f"message {number} is from {show(role)}; known are {', '.join(known)}"
    return message, f'write "{meant}"' if meant else "correct it, or name it under tags"


def _named(entry: Entry, *roles: str) -> tuple[str, ...]:
    return tuple(name for role in roles if (name := entry.tag(role)))


def _keeps(value: JsonObject, entry: Entry, stage: str, column: str) -> bool:
    """Whether the converter leaves questions and answers as the stage's processor asks."""
    role_key = entry.tag("role_tag") or ""
    roles = [message.get(role_key) for message in value[column]]
    if roles and entry.tag("system_tag") and roles[0] == entry.tag("system_tag"):
        roles = roles[1:]
    turns = (
        (entry.tag("user_tag"), entry.tag("observation_tag")),
        (entry.tag("assistant_tag"), entry.tag("function_tag")),
    )
    broken = any(role not in turns[index % 2] for index, role in enumerate(roles))
    if broken or len(roles) % 2 != (1 if entry.ranking else 0):
        return False
    if isinstance(value.get(entry.column("kto_tag") or ""), bool):
        questions, answers = len(roles) - 1, 2
    elif entry.ranking and all(
        isinstance(value.get(entry.column(role) or ""), dict) for role in ("chosen", "rejected")
    ):
        questions, answers = len(roles), 2
    else:
        questions, answers = len(roles) - 1, 1
    if stage == "pt":
        return True
    enough = stage == "ppo" or answers == (1 if stage == "sft" else 2)
    return questions > 0 and questions % 2 == 1 and enough
