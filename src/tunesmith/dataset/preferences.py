"""Pairs and labels from which nothing can be learned. The training would run all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tunesmith.dataset.entry import Entry
from tunesmith.dataset.reading import Piece
from tunesmith.dataset.report import Finding

_TOLD = 10  # pairs that are told one by one


class Preferences:
    """Looks at the pairs of rm and dpo and at the labels of kto, as they come."""

    def __init__(self, entry: Entry, stage: str) -> None:
        self._pairs = entry.ranking
        self._tag = entry.column("kto_tag") if stage == "kto" else None
        self._chosen, self._rejected = entry.column("chosen"), entry.column("rejected")
        self._content = entry.tag("content_tag") if entry.formatting == "sharegpt" else None
        self._labels: Counter[bool] = Counter()
        self._compared, self._same = 0, 0

    def add(self, piece: Piece) -> Iterator[Finding]:
        """Yield the pairs of a piece whose answers are the same."""
        if not (self._pairs or self._tag):
            return
        for row in piece.rows:
            if not isinstance(row.value, dict):
                continue
            if self._tag and isinstance(label := row.value.get(self._tag), bool):
                self._labels[label] += 1
            if not self._pairs:
                continue
            chosen = self._text(row.value.get(self._chosen or ""))
            rejected = self._text(row.value.get(self._rejected or ""))
            if chosen is None or rejected is None:
                continue
            self._compared += 1
            if chosen.strip() == rejected.strip():
                self._same += 1
                if self._same <= _TOLD:
                    yield Finding(
                        "warning",
                        f'"{self._chosen}" and "{self._rejected}" are the same: nothing is learned',
                        "write two different answers or delete the row",
                        row.number,
                        row.line,
                        field=self._chosen,
                        file=piece.file,
                    )

    def findings(self) -> Iterator[Finding]:
        """Yield what holds for all rows."""
        if self._compared and self._same == self._compared:
            message = "in every pair both answers are the same: nothing can be learned"
            yield Finding("error", message, "write two different answers", field=self._chosen)
        elif self._same > _TOLD:
            text = f"{self._same} pairs have the same answer twice; the first {_TOLD} are told"
            yield Finding("note", text, "")
        if sum(self._labels.values()) > 1 and len(self._labels) == 1:
            label = str(next(iter(self._labels))).lower()
            message = f'every "{self._tag}" is {label}: KTO learns from both kinds'
            yield Finding("warning", message, "add rows of the other kind", field=self._tag)

    @property
    def hidden(self) -> int:
        """How many warnings were counted only."""
        return max(0, self._same - _TOLD)

    def _text(self, answer: Any) -> str | None:
        if self._content is not None:
            answer = answer.get(self._content) if isinstance(answer, dict) else None
        return answer if isinstance(answer, str) else None
