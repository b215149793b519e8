"""What a check found: values only, no reading and no printing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError

Severity = Literal["error", "warning", "note"]

SHOWN = 50  # findings listed on a screen
HELD = 10_000  # findings a report holds; the rest are counted, so that memory stays bounded


@dataclass(frozen=True)
class Finding:
    """One fault, where it lies and how to fix it.

    `row` counts from 1; `line` and `column` are those of the text, from 1; `field`
    is the key in the row. For a fault inside a row, `line` is the row's first line.
    `file` names the file of a folder; rows and lines are counted in it.
    """

    severity: Severity
    message: str
    fix: str
    row: int | None = None
    line: int | None = None
    column: int | None = None
    field: str | None = None
    file: str | None = None

    def render(self) -> str:
        """Return one line: where, what, how to fix it."""
        place = [self.file] if self.file is not None else []
        if self.row is not None:
            place.append(f"row {self.row}")
        if self.line is not None:
            place.append(f"line {self.line}")
        if self.column is not None:
            place.append(f"column {self.column}")
        where = ", ".join(place) + ": " if place else ""
        return f"{where}{self.message}" + (f"; {self.fix}" if self.fix else "")


class Findings:
    """Findings as they come: the first `HELD` whole, the others counted by severity and field."""

    def __init__(self) -> None:
        self.held: list[Finding] = []
        self.beyond: Counter[tuple[str, str | None]] = Counter()

    def add(self, finding: Finding) -> None:
        """Keep or count one finding."""
        if len(self.held) < HELD:
            self.held.append(finding)
        else:
            self.beyond[finding.severity, finding.field] += 1

    def extend(self, findings: Iterable[Finding]) -> None:
        """Keep or count several."""
        for finding in findings:
            self.add(finding)

    def drop(self, fields: frozenset[str]) -> None:
        """Take back what was found about the rows' `fields`: it is told once for the file."""
        self.held = [f for f in self.held if f.row is None or f.field not in fields]
        for key in [key for key in self.beyond if key[1] in fields]:
            del self.beyond[key]

    def hidden(self, severity: Severity) -> int:
        """Return how many of a severity were counted only."""
        return sum(count for (kind, _), count in self.beyond.items() if kind == severity)


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest length of a text, in characters."""

    min: int
    median: int
    max: int


def spread(lengths: Sequence[int]) -> Spread | None:
    """Return the spread of `lengths`, or None when there are none."""
    if not lengths:
        return None
    return Spread(min(lengths), statistics.median_low(lengths), max(lengths))


@dataclass(frozen=True)
class DatasetReport:
    """All that was found in one data file.

    `rows` is None when the rows were not looked at (a hub source, csv, parquet).
    `kept` counts the rows that LLaMA-Factory 0.9.3 hands to the tokenizer (its
    converter and the first filter of its processor; before num_samples, max_samples
    and cutoff_len). It is 0 when LLaMA-Factory would stop with an error. For a file
    with errors it is a lower bound: some readers behind LLaMA-Factory are lenient
    about broken JSON, this check is not. `hidden_errors` and `hidden_warnings` count
    those beyond the findings held. `looks` holds what the thorough check saw, `media` the
    files that rows name and that are there, `absolute_media` one named by its whole path.
    """

    key: str | None
    file: str
    formatting: str
    rows: int | None
    findings: tuple[Finding, ...]
    sha256: str | None
    prompt_characters: Spread | None
    response_characters: Spread | None
    kept: int
    hidden_errors: int = 0
    hidden_warnings: int = 0
    looks: JsonObject = field(default_factory=dict)
    media: tuple[str, ...] = ()
    absolute_media: str | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Faults that stop the training or lose rows."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Things that are most likely not meant."""
        return tuple(f for f in self.findings if f.severity == "warning")

    @property
    def error_count(self) -> int:
        """All errors, those not held included."""
        return len(self.errors) + self.hidden_errors

    @property
    def warning_count(self) -> int:
        """All warnings, those not held included."""
        return len(self.warnings) + self.hidden_warnings

    def lines(self, cap: int = SHOWN) -> list[str]:
        """Return the findings as lines, errors first, at most `cap` and a count of the rest."""
        order = {"error": 0, "warning": 1, "note": 2}
        ordered = sorted(self.findings, key=lambda f: order[f.severity])
        shown = [f"{f.severity}: {f.render()}" for f in ordered[:cap]]
        more = len(ordered) - len(shown) + self.hidden_errors + self.hidden_warnings
        if more:
            shown.append(f"... and {more} more")
        return shown

    def raise_if_bad(self) -> None:
        """Raise UsageError when there are errors: the first in its line, all in its detail."""
        if not self.errors:
            return
        count = self.error_count
        of_key = f" (data set {self.key})" if self.key else ""
        title = "1 fault" if count == 1 else f"{count} faults, the first"
        raise UsageError(
            f"{self.file}{of_key}: {title}: {self.errors[0].render()}", detail=self.lines()
        )

    def to_json(self) -> JsonObject:
        """Return what run.json and the HTML report keep of a data set (no single findings)."""
        value = asdict(self)
        del value["findings"]
        for name in ("hidden_errors", "hidden_warnings", "looks", "media", "absolute_media"):
            del value[name]
        value["warnings"] = self.warning_count
        return value
