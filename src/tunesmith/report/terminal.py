"""The short before/after table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from tunesmith.report.i18n import Translator, checked_language, translator
from tunesmith.report.record import GUARD, Row, pair_answers, read_record
from tunesmith.report.sections import headlines
from tunesmith.report.timing import phase_times

CELL = 60  # characters of a cell: three lines of an 80-column terminal
PROMPTS = 10


def summary_table(run_dir: Path, *, language: str = "en", rows: int = PROMPTS) -> Table:
    """Return prompt, answer before, answer after and met marks for the first `rows` prompts.

    The caption holds the figures. Raises UsageError where `run_dir` is no run.
    """
    record = read_record(run_dir)
    t = translator(checked_language(language))
    # Of the guard set the figures are enough here.
    pairs = [p for p in pair_answers(record.before, record.after) if p[0] != GUARD]
    figures = [
        f"{item.label} {item.value}" + (f" ({item.note})" if item.note else "")
        for item in headlines(record, phase_times(record.events), t)
    ]
    hidden = len(pairs) - rows
    if hidden > 0:
        figures.append(t("{hidden} more answers are in report.html").format(hidden=hidden))
    table = Table(
        caption=Text(" · ".join(figures)),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("Prompt", "Before", "After"):
        table.add_column(t(name), overflow="fold", ratio=1)
    table.add_column(t("Met"), no_wrap=True)
    for _, before, after in pairs[: max(rows, 0)]:
        prompt = str((after or before or {}).get("prompt", ""))
        # Answers are a model's text: Text shows "[red]" as it stands, a str would obey it.
        table.add_row(
            Text(_short(prompt)), Text(_said(before)), Text(_said(after)), _met(before, after, t)
        )
    return table


def _said(row: Row | None) -> str:
    return "–" if row is None else _short(str(row.get("answer", "")))


def _short(text: str) -> str:
    """One line without control characters: an answer must not move the cursor."""
    line = " ".join(text.split())
    line = "".join(letter for letter in line if letter.isprintable())
    return line if len(line) <= CELL else line[: CELL - 1] + "…"


def _met(before: Row | None, after: Row | None, t: Translator) -> Text:
    mark = {True: t("yes"), False: t("no"), None: "–"}
    words = [mark[None if row is None else row.get("met")] for row in (before, after)]
    if words == ["–", "–"]:
        return Text("–")
    style = "green" if words[1] == mark[True] else "red" if words[1] == mark[False] else ""
    return Text(f"{words[0]} → {words[1]}", style=style)
