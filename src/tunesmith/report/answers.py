"""Answers before and after, their scores, and prompt parity. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.report.i18n import Translator
from tunesmith.report.record import GUARD, Record, Row, pair_answers

LONG_ANSWER = 400  # characters; a longer answer is folded after this many


LONG_LINES = 6  # or after this many lines: an untuned model likes to repeat line breaks


FEW_PATTERNS = 3  # up to this many patterns are listed above the table instead of in each row


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its beginning, the folded rest, and whether it met its expectation.

    `cut`: it was ended by the token limit, not by the model.
    """

    text: str
    rest: str
    met: bool | None
    cut: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt with both answers; `before` or `after` is None if there is none."""

    prompt: str
    reference: str
    expect: str
    before: Answer | None
    after: Answer | None


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """Prompts of one kind, and the patterns for their answers, each once.

    With more than FEW_PATTERNS of them `patterns` is empty and each row shows its own.
    """

    name: str
    patterns: tuple[str, ...]
    rows: tuple[Comparison, ...]


def comparisons(record: Record) -> list[AnswerSet]:
    """Return the answers side by side, by set, the prompts first."""
    found: dict[str, list[Comparison]] = {}
    for name, before, after in pair_answers(record.before, record.after):
        row = after or before or {}
        comparison = Comparison(
            prompt=str(row.get("prompt", "")),
            reference=str(row.get("reference") or ""),
            expect=str(row.get("expect") or ""),
            before=answer(before),
            after=answer(after),
        )
        found.setdefault(name, []).append(comparison)
    sets = []
    for name, rows in found.items():
        patterns = tuple(dict.fromkeys(row.expect for row in rows if row.expect))
        few = len(patterns) <= FEW_PATTERNS
        sets.append(AnswerSet(name, patterns if few else (), tuple(rows)))
    return sets


@dataclass(frozen=True, slots=True)
class Score:
    """One value of both evaluations, as text; "–" if it was not measured."""

    label: str
    before: str
    after: str


def scores(record: Record, name: str, t: Translator) -> list[Score]:
    """Return ROUGE, BLEU, exact matches and met prompts of one set; with loss for the guard set."""
    entries = [record.evaluation.get(when) or {} for when in ("before", "after")]
    found = []

    def add(label: str, values: list[Any], shape: str) -> None:
        if any(value is not None for value in values):
            said = [shape.format(value) if value is not None else "–" for value in values]
            found.append(Score(label, *said))

    if name == GUARD:
        guards = [entry.get(GUARD) or {} for entry in entries]
        add(t("loss (nat/token)"), [guard.get("loss") for guard in guards], "{:.4f}")
        add(t("perplexity"), [guard.get("perplexity") for guard in guards], "{:.2f}")
        met = [guard.get("expected") for guard in guards]
        add(t("right answers"), [_of(item) for item in met], "{}")
    measured = [(entry.get("scores") or {}).get(name) or {} for entry in entries]
    for key, label in (("rouge-1", "ROUGE-1"), ("rouge-2", "ROUGE-2"), ("rouge-l", "ROUGE-L")):
        add(label, [item.get(key) for item in measured], "{:.1f}")
    add("BLEU-4", [item.get("bleu-4") for item in measured], "{:.1f}")
    add(t("exact matches"), [_of(item.get("exact")) for item in measured], "{}")
    return found


def _of(item: Mapping[str, Any] | None) -> str | None:
    return f"{item['met']} / {item['of']}" if item else None


def parity_renderers(record: Record) -> list[tuple[str, str]]:
    """Each prompt renderer with its first difference, empty if it agrees."""
    differences: dict[str, str] = {}
    for item in record.parity.get("differences", []):
        text = f"{item['probe']}: {item['found']!r} / {item['expected']!r} (id {item['at']})"
        differences.setdefault(str(item["renderer"]), text)
    names = ("chat", "inv_chat", "api", "chat_template", "modelfile")
    return [(name, differences.get(name, "")) for name in names]


def answer(row: Row | None) -> Answer | None:
    """Return a row's answer with its beginning and the rest to fold away."""
    if row is None:
        return None
    text = str(row.get("answer", "")).strip()
    end = len(text)
    if end > LONG_ANSWER * 1.2:  # folding a slightly longer answer is not worth it
        end = text.rfind(" ", LONG_ANSWER - 40, LONG_ANSWER) + 1 or LONG_ANSWER
    lines = text[:end].splitlines(keepends=True)
    end = min(end, sum(len(line) for line in lines[:LONG_LINES]))
    return Answer(
        text[:end].rstrip(), text[end:].strip(), row.get("met"), row.get("finished") is False
    )
