"""What holds for a row of instruction, input and output.

Source: AlpacaDatasetConverter (data/converter.py) and the first filter of the
processors (data/processor/*.py) of LLaMA-Factory 0.9.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.dataset.columns import Outcome, misspelt, needed_roles, text_fault
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.report import Finding
from tunesmith.dataset.scan import Row
from tunesmith.dataset.syntax import quoted, told


def check_alpaca(rows: Sequence[Row], entry: Entry, stage: str, absent: frozenset[str]) -> Outcome:
    """Check each row; `absent` are columns that no row has (told already)."""
    findings: list[Finding] = []
    prompts: list[int] = []
    answers: list[int] = []
    stops, kept = False, 0
    for row in rows:
        faults = list(_row_faults(row, entry, stage, absent))
        findings.extend(faults)
        stops = stops or _stops(row.value, entry)
        kept += _keeps(row.value, entry, stage)
        if any(fault.severity == "error" for fault in faults):
            continue
        prompts.append(len(_prompt(row.value, entry)))
        answer = row.value.get(entry.column("chosen" if stage == "rm" else "response") or "")
        if isinstance(answer, str):
            answers.append(len(answer))
    return Outcome(tuple(findings), stops, kept, tuple(prompts), tuple(answers))


def _row_faults(row: Row, entry: Entry, stage: str, absent: frozenset[str]) -> Iterator[Finding]:
    value = row.value
    known = {column for role in entry.used_roles() if (column := entry.column(role))}
    needed = needed_roles(entry, stage)

    def error(message: str, fix: str, field: str) -> Finding:
        return Finding("error", message, fix, row=row.number, line=row.line, field=field)

    for role in ("prompt", "query", "system", "tools"):
        column = entry.column(role)
        if column is None or column in absent:
            continue
        wrong = misspelt(value, column, known) if column not in value else None
        if wrong:
            yield error(f'no "{column}" but "{wrong}"', f'rename it to "{column}"', column)
        elif column not in value and role in needed and not _prompt(value, entry):
            yield error(f'no "{column}"', f'add "{column}": "..."', column)
        elif fault := text_fault(value, column):
            yield error(fault, quoted(value[column]), column)
        elif role in needed and column in value and not _prompt(value, entry).strip():
            message = f'the prompt is empty ("{column}" and what joins it)'
            yield Finding(
                "warning", message, "write a question", row.number, row.line, field=column
            )
    history = entry.column("history")
    if history is not None and not _pairs(value.get(history)):
        fix = 'write [["question", "answer"], ...] or []'
        yield error(f'"{history}" is not a list of pairs of strings', fix, history)
    for role in needed:
        column = entry.column(role)
        if role == "prompt" or column is None or column in absent:
            continue
        if role == "kto_tag":
            if not isinstance(value.get(column), bool):
                yield error(f'"{column}" is not true or false', "write true or false", column)
            continue
        held = value.get(column)
        if column not in value:
            wrong = misspelt(value, column, known)
            if wrong:
                yield error(f'no "{column}" but "{wrong}"', f'rename it to "{column}"', column)
            else:
                yield error(f'no "{column}"', f'add "{column}": "..." or delete the row', column)
        elif held is None:
            yield error(f'"{column}" is null', "write the answer or delete the row", column)
        elif not isinstance(held, str):
            yield error(f'"{column}" is {told(held)}, not a string', quoted(held), column)
        elif not held.strip():
            yield error(f'"{column}" is empty', "write the answer or delete the row", column)


def _prompt(value: dict[str, Any], entry: Entry) -> str:
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


def _stops(value: dict[str, Any], entry: Entry) -> bool:
    """Whether the converter raises: join of no strings, history that does not unpack."""
    for role in ("prompt", "query"):
        held = value.get(entry.column(role) or "")
        if held and not isinstance(held, str):
            return True
    history = value.get(entry.column("history") or "")
    if not isinstance(history, list):
        return False
    return not all(isinstance(pair, (list, str)) and len(pair) == 2 for pair in history)


def _keeps(value: dict[str, Any], entry: Entry, stage: str) -> bool:
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
