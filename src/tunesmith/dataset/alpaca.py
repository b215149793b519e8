"""What holds for a row of instruction, input and output.

Source: AlpacaDatasetConverter (data/converter.py) and the first filter of the
processors (data/processor/*.py) of LLaMA-Factory 0.9.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.calls import tools_fault
from tunesmith.dataset.columns import Rules, misspelt, needed_roles, text_fault
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding, Severity
from tunesmith.dataset.scan import Row
from tunesmith.dataset.syntax import quoted, told


class AlpacaRules(Rules):
    """Check each row, piece by piece.

    `convert` is the command that makes JSON Lines of a table, for a file that is one.
    """

    def __init__(self, entry: Entry, stage: str, convert: str | None = None) -> None:
        super().__init__()
        self._entry, self._stage, self._convert = entry, stage, convert
        self._needed = needed_roles(entry, stage)
        self._known = {column for role in entry.used_roles() if (column := entry.column(role))}
        named = [(role, entry.column(role)) for role in ("system", "tools")]
        self._optional = [(role, column) for role, column in named if column]
        # Nearly all rows of nearly all files are sound; they need none of the slow words.
        self._quick = stage == "sft" and not (
            entry.ranking or entry.column("history") or entry.column("kto_tag")
        )

    def add(self, piece: Piece) -> Iterator[Finding]:
        """Yield what is wrong with the rows of a piece."""
        entry, stage = self._entry, self._stage
        answer_column = entry.column("chosen" if stage == "rm" else "response") or ""
        for row in piece.rows:
            if not isinstance(row.value, dict):
                continue
            if self._quick and self._sound(row.value):
                continue
            faulty = False
            for fault in self._row_faults(row, piece.file):
                faulty = faulty or fault.severity == "error"
                yield fault
            self.stops = self.stops or _stops(row.value, entry)
            self.kept += _keeps(row.value, entry, stage)
            if faulty:
                continue
            self.prompt_lengths.append(len(_prompt(row.value, entry)))
            answer = row.value.get(answer_column)
            if isinstance(answer, str):
                self.answer_lengths.append(len(answer))

    def _sound(self, value: JsonObject) -> bool:
        """Whether a row is plainly sound; if so it is counted."""
        entry = self._entry
        query, length = entry.column("query"), 0
        prompt = value.get(entry.column("prompt") or "")
        answer = value.get(entry.column("response") or "")
        if type(prompt) is not str or type(answer) is not str:
            return False
        if not prompt.strip() or not answer.strip():
            return False
        if query is not None:
            joined = value.get(query)
            if type(joined) is not str:
                return False
            length = len(joined) + 1 if joined else 0
        for role, column in self._optional:
            held = value.get(column)
            if type(held) is not str or (role == "tools" and held):
                return False
        self.kept += 1
        self.prompt_lengths.append(len(prompt) + length)
        self.answer_lengths.append(len(answer))
        return True

    def _row_faults(self, row: Row, file: str | None) -> Iterator[Finding]:
        value, entry, known, needed = row.value, self._entry, self._known, self._needed

        def found(severity: Severity, message: str, fix: str, field: str) -> Finding:
            return Finding(severity, message, fix, row.number, row.line, field=field, file=file)

        for role in ("prompt", "query", "system", "tools"):
            column = entry.column(role)
            if column is None:
                continue
            wrong = misspelt(value, column, known) if column not in value else None
            if wrong:
                fix = f'rename it to "{column}"'
                yield found("error", f'no "{column}" but "{wrong}"', fix, column)
            elif column not in value and role in needed and not _prompt(value, entry):
                yield found("error", f'no "{column}"', f'add "{column}": "..."', column)
            elif fault := text_fault(value, column):
                yield found("error", fault, self._as_text(value[column]), column)
            elif role == "tools" and (unread := tools_fault(value.get(column) or "")):
                yield found("error", f'"{column}" {unread[0]}', unread[1], column)
            elif role in needed and column in value and not _prompt(value, entry).strip():
                message = f'the prompt is empty ("{column}" and what joins it)'
                fix = "write a question"
                if self._stage == "pt":
                    message, fix = f'"{column}" is empty', "write a text or delete the row"
                yield found("warning", message, fix, column)
        history = entry.column("history")
        if history is not None and not _pairs(value.get(history)):
            fix = 'write [["question", "answer"], ...] or []'
            message = f'"{history}" is not a list of pairs of strings'
            yield found("error", message, fix, history)
        for role in needed:
            column = entry.column(role)
            if role != "prompt" and column is not None:
                wanting = self._answer_fault(value, role, column)
                if wanting is not None:
                    yield found("error", wanting[0], wanting[1], column)

    def _as_text(self, held: Any) -> str:
        """Return how a value becomes a string: in a table, quotes do not make it one."""
        if self._convert is not None:
            return f"the reader of tables takes no quotes for text; {self._convert} keeps it"
        if isinstance(held, list) and held and isinstance(held[0], dict):
            return "write a string, or let `inv data.convert` make rows of messages of it"
        return quoted(held)

    def _answer_fault(self, value: JsonObject, role: str, column: str) -> tuple[str, str] | None:
        """Return (message, fix) for an answer that trains nothing."""
        held = value.get(column)
        if role == "kto_tag":
            if isinstance(held, bool):
                return None
            return f'"{column}" is {told(held)}, not true or false', "write true or false"
        if column not in value:
            wrong = misspelt(value, column, self._known)
            if wrong:
                return f'no "{column}" but "{wrong}"', f'rename it to "{column}"'
            return f'no "{column}"', f'add "{column}": "..." or delete the row'
        if held is None:
            fix = "write the answer or delete the row"
            if self._convert is not None:
                fix += f"; a word for nothing (NA, None, null) is kept by {self._convert}"
            return f'"{column}" is null', fix
        if not isinstance(held, str):
            return f'"{column}" is {told(held)}, not a string', self._as_text(held)
        if not held.strip():
            return f'"{column}" is empty', "write the answer or delete the row"
        return None


def _prompt(value: JsonObject, entry: Entry) -> str:
    """Return the question as LLaMA-Factory joins it; parts that are no strings are left out."""
    columns = (entry.column("prompt"), entry.column("query"))
    parts = [value.get(column) for column in columns if column]
    return "\n".join(part for part in parts if isinstance(part, str) and part)


def _pairs(history: Any) -> bool:
    return history is None or (
        isinstance(history, list)
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
            for pair in history
        )
    )


def _stops(value: JsonObject, entry: Entry) -> bool:
    """Whether the converter raises: join of no strings, history that is no pairs of texts."""
    for role in ("prompt", "query"):
        held = value.get(entry.column(role) or "")
        if held and not isinstance(held, str):
            return True
    history = value.get(entry.column("history") or "")
    if not isinstance(history, list):
        return False
    return not all(
        isinstance(pair, (list, str))
        and len(pair) == 2
        and all(said is None or isinstance(said, str) for said in pair)
        for pair in history
    )


def _keeps(value: JsonObject, entry: Entry, stage: str) -> bool:
    """Whether the row has as many answers as the stage's processor asks for."""

    def held(role: str) -> Any:
        return value.get(entry.column(role) or "")

    pair = entry.ranking and all(isinstance(held(r), str) for r in ("chosen", "rejected"))
    if pair or isinstance(held("kto_tag"), bool):
        answers = 2
    else:
        answers = 1 if isinstance(held("response"), str) else 0
    if stage in ("pt", "ppo"):
        return True
    return answers == 1 if stage == "sft" else answers == 2
