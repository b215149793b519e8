"""docs/failures.md and docs/failures_zh.md: what is printed, why, and what to do.

The texts are in configs/failures.yml, one row for each kind the code tells apart. Rendered
and checked with the other derived files (maintain/render.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml

from tunesmith.basemodel.fetch import HEADLINES
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.hosts import ssh_errors
from tunesmith.job.run.failures import CLASSES

LANGUAGES = ("en", "zh")
# Sections whose rows are the kinds of a piece of code; `quotes` are free.
KINDS: Mapping[str, frozenset[str]] = {
    "ssh": frozenset(get_args(ssh_errors.Kind)) - {"unknown"},
    "hub": frozenset(HEADLINES),
    "run": frozenset(CLASSES),
}
QUOTES = "quotes"

_PAGES = {"en": "failures.md", "zh": "failures_zh.md"}
_HEADS = {
    "en": (
        "# Message, cause, command",
        "`...` stands for what differs each time, `gpu1` for your host, `RUN` for a run id.",
        ("What is printed", "Why", "What to do"),
        "[中文](failures_zh.md)",
    ),
    "zh": (
        "# 报错、原因、命令",
        "`...` 代表每次不同的内容，`gpu1` 换成你的主机名，`RUN` 换成训练编号（run id）。",
        ("提示", "原因", "怎么办"),
        "[English](failures.md)",
    ),
}
_NOTICE = "<!-- Rendered by `inv stack.render` from configs/failures.yml: change it there. -->"
# YAML joins the lines of a folded text by a space, which Chinese does not have.
_WIDE = r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]"
_JOINT = re.compile(rf"(?<={_WIDE}) (?={_WIDE})")


@dataclass(frozen=True)
class Row:
    """One failure: `says` is what is printed (`...`: what differs), `printed_by` the folder
    of ours that prints it, empty where another program does; `why` and `do` by language."""

    kind: str
    says: tuple[str, ...]
    printed_by: str
    why: Mapping[str, str]
    do: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """Rows of one moment of the work; `kinds` is a key of KINDS, or QUOTES."""

    title: Mapping[str, str]
    intro: Mapping[str, str]
    kinds: str
    rows: tuple[Row, ...]


def load_sections(path: Path) -> tuple[Section, ...]:
    """Return the sections of configs/failures.yml.

    Raises UsageError naming the row that lacks a text, and each kind that has no row.
    """
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections = tuple(_section(path, item) for item in raw)
    for kinds, wanted in KINDS.items():
        rows = [row for section in sections if section.kinds == kinds for row in section.rows]
        if faulty := sorted(wanted ^ {row.kind for row in rows}):
            raise UsageError(f"{path}: `{kinds}`: missing or unknown rows: {', '.join(faulty)}")
    for row in (row for section in sections if section.kinds == "run" for row in section.rows):
        if row.do["en"] != CLASSES[row.kind].advice:
            raise UsageError(
                f"{path}: `{row.kind}`: the run's own advice is {CLASSES[row.kind].advice!r}",
                hint="update `do` in both languages",
            )
    return sections


def render(root: Path) -> dict[Path, str]:
    """Return path -> text of the pages, as they should be."""
    sections = load_sections(root / "configs" / "failures.yml")
    return {root / "docs" / _PAGES[key]: _page(sections, key) for key in LANGUAGES}


def _page(sections: Iterable[Section], language: str) -> str:
    title, intro, head, other = _HEADS[language]
    lines = [title, "", _NOTICE, "", f"{intro} {other}"]
    for section in sections:
        lines += ["", f"## {section.title[language]}", "", section.intro[language], ""]
        lines += [_cells(head), "|---|---|---|"]
        lines += [_cells(_row(section.kinds, row, language)) for row in section.rows]
    return "\n".join(lines) + "\n"


def _row(kinds: str, row: Row, language: str) -> tuple[str, str, str]:
    shown = [f"`{text}`" if "`" not in text else f"`` {text} ``" for text in row.says]
    if kinds == "run":
        shown = [f"**{row.kind}**", *shown]
    return "<br>".join(shown), row.why[language], row.do[language]


def _cells(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"


def _section(path: Path, raw: JsonObject) -> Section:
    kinds = str(raw["kinds"])
    if kinds not in (*KINDS, QUOTES):
        raise UsageError(f"{path}: `kinds: {kinds}`: expected {', '.join((*KINDS, QUOTES))}")
    rows = tuple(_read_row(path, kinds, kind, row) for kind, row in raw["rows"].items())
    title = _texts(path, kinds, "title", raw)
    return Section(title, _texts(path, kinds, "intro", raw), kinds, rows)


def _read_row(path: Path, kinds: str, kind: str, raw: JsonObject) -> Row:
    says = [HEADLINES[kind]] if kinds == "hub" and kind in HEADLINES else raw.get("says", [])
    if not says:
        raise UsageError(f"{path}: `{kind}`: `says` is missing: what is printed")
    if kinds == QUOTES and "from" not in raw:
        raise UsageError(f"{path}: `{kind}`: `from` is missing: the folder that prints it")
    return Row(
        kind=kind,
        says=tuple(map(str, says)),
        printed_by=str(raw.get("from", "")),
        why=_texts(path, kind, "why", raw),
        do=_texts(path, kind, "do", raw),
    )


def _texts(path: Path, where: str, key: str, raw: JsonObject) -> dict[str, str]:
    """Return a text in every language."""
    texts = raw.get(key) or {}
    if set(texts) != set(LANGUAGES) or not all(texts.values()):
        wanted = " and ".join(LANGUAGES)
        raise UsageError(f"{path}: `{where}`: `{key}`: expected a text in {wanted}")
    return {language: _JOINT.sub("", str(texts[language])) for language in LANGUAGES}
