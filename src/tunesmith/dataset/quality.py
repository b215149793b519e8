"""What no rule forbids and a person should know: near-duplicates, short answers, languages,
personal data, reasoning. All warnings; the training would run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Set as AbstractSet

from tunesmith.core.documents import JsonObject
from tunesmith.dataset.columns import SourcePosition
from tunesmith.dataset.duplicates import Places, told_place
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.near_duplicates import ALIKE, Sketches
from tunesmith.dataset.pii import hints
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding, Findings
from tunesmith.dataset.texts import texts_of

_TOLD = 10  # findings of one kind that are told with their rows
_SCRIPTS = (
    ("Japanese", re.compile(r"[\u3040-\u30ff]")),
    ("Korean", re.compile(r"[\uac00-\ud7a3]")),
    ("Chinese", re.compile(r"[\u4e00-\u9fff]")),
    ("Cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("Arabic", re.compile(r"[\u0600-\u06ff]")),
)
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_JUDGED = 300  # characters of a text that decide its script


class Looks:
    """Looks at rows as they come; `findings` and `record` tell what was seen."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._sketches = Sketches()
        self._places = Places()
        self._scripts: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._found = Findings()
        self._thought: list[SourcePosition] = []
        self._plain: list[SourcePosition] = []
        self._near = 0

    def add(self, piece: Piece) -> None:
        """Look at the rows of a piece."""
        texts = []
        for row in piece.rows:
            if not isinstance(row.value, dict):
                continue
            question, answer = texts_of(row.value, self._entry)
            texts.append(f"{question}\n{answer}")
            self._places.add(row.number, row.line, piece.file)
            self._look(question, answer, row.number, row.line, piece.file)
        self._sketches.add(texts)

    def _look(
        self, question: str, answer: str, number: int, line: int | None, file: str | None
    ) -> None:
        def warn(kind: str, message: str, fix: str) -> None:
            self._counts[kind] += 1
            if self._counts[kind] <= _TOLD:
                self._found.add(Finding("warning", message, fix, number, line, file=file))

        if len(answer.strip()) == 1:
            warn(
                "short",
                f"the answer is one character: {answer.strip()}",
                "is it whole? a model learns to answer as short",
            )
        asked, told = script(question), script(answer)
        self._scripts[told] += 1
        if asked != told and "none" not in (asked, told):
            warn(
                "crossed",
                f"the question is {asked}, the answer {told}",
                "right for a translation; else the model learns to change the language",
            )
        for kind, shown in hints(f"{question}\n{answer}"):
            fix = "delete or replace what is private: a model repeats what it has seen"
            warn("personal", f"looks like {kind}: {shown}", fix)
        self._look_for_thought(answer, number, line, file)

    def _look_for_thought(
        self, answer: str, number: int, line: int | None, file: str | None
    ) -> None:
        opened, closed = answer.count("<think>"), answer.count("</think>")
        kind = "thought" if opened and closed else "plain"
        self._counts[kind] += 1
        examples = self._thought if kind == "thought" else self._plain
        if len(examples) < 3:
            examples.append(SourcePosition(number, line, file))
        if opened != closed or opened > 1 or (opened and not answer.lstrip().startswith("<think>")):
            self._counts["torn"] += 1
            if self._counts["torn"] <= _TOLD:
                message = f"<think> stands {opened} and </think> {closed} times in the answer"
                if opened == closed == 1:
                    message = "text stands before <think>"
                fix = "begin the answer with one <think>...</think>, or have none"
                self._found.add(Finding("warning", message, fix, number, line, file=file))

    def findings(self, told: AbstractSet[int]) -> Findings:
        """Return warnings with rows, the first of each kind, and a note of how many there are.

        `told` holds the rows, counted from 0, that are known as duplicates already.
        """
        found = self._found
        pairs = [pair for pair in self._sketches.pairs() if pair.again not in told]
        self._near = len(pairs)
        for pair in pairs[:_TOLD]:
            place, before = self._places.place(pair.again), self._places.place(pair.first)
            message = f"about {pair.alike:.0%} the same as {told_place(before)}"
            fix = "keep one; near-duplicates count twice and leak into the validation rows"
            found.add(Finding("warning", message, fix, place.row, place.line, file=place.file))
        thought, plain = self._counts["thought"], self._counts["plain"]
        if thought and plain:
            few, places = ("with", self._thought) if thought <= plain else ("without", self._plain)
            message = f"{min(thought, plain)} of {thought + plain} answers are {few} <think>"
            fix = f"make them one kind; the first is {told_place(places[0])}"
            found.add(Finding("warning", message, fix))
        for kind, name in _NAMES.items():
            count = self._near if kind == "near" else self._counts[kind]
            if count > _TOLD:
                found.add(Finding("note", f"{count} rows {name}; the first {_TOLD} are told", ""))
        return found

    def record(self) -> JsonObject:
        """Return the counts, for the screen."""
        return {
            "near_duplicates": self._near,
            "alike": ALIKE,
            "scripts": dict(self._scripts.most_common()),
            "one_character_answers": self._counts["short"],
            "other_language_answers": self._counts["crossed"],
            "personal_data_hints": self._counts["personal"],
            "with_think": self._counts["thought"],
            "without_think": self._counts["plain"],
        }


_NAMES = {
    "near": "are near-duplicates",
    "short": "have an answer of one character",
    "crossed": "are answered in another language than asked",
    "personal": "look as if they held personal data or keys",
    "torn": "have <think> in disorder",
}


def script(text: str) -> str:
    """Return the script most of a text's letters are of: Latin, Chinese, ..., none.

    Japanese is told by its kana: a fifth of the letters is enough.
    """
    if text.isascii():
        return "Latin" if _LATIN.search(text) else "none"
    text = text[:_JUDGED]
    counts = {name: float(len(pattern.findall(text))) for name, pattern in _SCRIPTS}
    counts["Latin"] = len(_LATIN.findall(text)) / 3  # a word is several letters
    kana = counts["Japanese"]
    if kana and kana * 4 >= counts["Chinese"] and kana * 2 > counts["Latin"]:
        return "Japanese"
    name = max(counts, key=lambda key: counts[key])
    return name if counts[name] else "none"
