"""Two or more runs side by side: one page and one table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from tunesmith.core import formats
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_text
from tunesmith.report import answers, sections, timing
from tunesmith.report.answers import Answer
from tunesmith.report.curve import Curve, read_curve
from tunesmith.report.i18n import LANGUAGES, Translator, checked_language, translator
from tunesmith.report.page import template
from tunesmith.report.picture import NARROW, compared_svg
from tunesmith.report.record import GUARD, Record, Row, met_of, read_record

# Keys that always differ between runs and are not informative.
_OWN = frozenset({"output_dir", "run_name", "logging_dir"})


@dataclass(frozen=True, slots=True)
class Line:
    """One value of every run; `best` is the index of the best one, or None."""

    label: str
    values: tuple[str, ...]
    best: int | None = None


@dataclass(frozen=True, slots=True)
class ComparedPrompt:
    """One prompt with every run's answer after training, None for runs without it."""

    prompt: str
    reference: str
    answers: tuple[Answer | None, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The content of a comparison page or table."""

    records: tuple[Record, ...]
    curves: tuple[Curve, ...]
    results: tuple[Line, ...]
    parameters: tuple[Line, ...]
    asked: tuple[ComparedPrompt, ...]
    warnings: tuple[str, ...]


def compare(run_dirs: Sequence[Path], language: str = "en") -> Comparison:
    """Read runs and compare them.

    Raises UsageError for fewer than two, for duplicates, or if a run.json is missing.
    """
    t = translator(checked_language(language))
    if len(run_dirs) < 2 or len(set(run_dirs)) < len(run_dirs):
        raise UsageError(
            "a comparison needs at least two different runs", hint="list them with `inv runs`"
        )
    records = tuple(read_record(folder) for folder in run_dirs)
    curves = tuple(read_curve(record.events) for record in records)
    return Comparison(
        records,
        curves,
        tuple(_results(records, curves, t)),
        tuple(_parameters(records)),
        tuple(_asked(records)),
        tuple(_warnings(records, t)),
    )


def write_comparison(run_dirs: Sequence[Path], path: Path, *, language: str = "en") -> Path:
    """Write the page to `path` and return it; nothing is written if the runs cannot be compared."""
    found = compare(run_dirs, language)
    curves = {
        record.run_id: curve for record, curve in zip(found.records, found.curves, strict=True)
    }
    page = template("compare.html.j2").render(
        t=translator(language),
        lang=LANGUAGES[language],
        found=found,
        names=[record.run_id for record in found.records],
        # Our own drawing: run ids are letters, digits and signs of a file name.
        wide=Markup(compared_svg(curves, language=language)),  # noqa: S704
        narrow=Markup(compared_svg(curves, size=NARROW, language=language)),  # noqa: S704
    )
    write_text(path, page)
    return path


def comparison_table(run_dirs: Sequence[Path], *, language: str = "en") -> Table:
    """Return results and differing parameters as a table, the best of each line in green."""
    t = translator(checked_language(language))
    found = compare(run_dirs, language)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for record in found.records:
        table.add_column(Text(record.run_id), overflow="fold")
    for number, lines in enumerate((found.results, found.parameters)):
        if number and lines:
            table.add_section()
        for line in lines:
            cells = [
                Text(value, style="green" if place == line.best else "")
                for place, value in enumerate(line.values)
            ]
            table.add_row(Text(line.label), *cells)
    if found.warnings:
        table.caption = Text(" ".join(found.warnings))
        table.caption_justify = "left"
    if not found.parameters:
        table.add_row(Text(t("parameters")), *[Text("=")] * len(found.records))
    return table


def _results(records: Sequence[Record], curves: Sequence[Curve], t: Translator) -> list[Line]:
    times = [timing.phase_times(record.events) for record in records]
    seconds = [sum(item.seconds for item in each) or None for each in times]
    spent = [timing.cost(record, each) for record, each in zip(records, times, strict=True)]
    met = [met_of(record.after) for record in records]
    guarded = [met_of(record.after, guard=True) for record in records]
    last = [curve.finite[-1].loss if curve.finite else None for curve in curves]

    def entry(record: Record, *keys: str) -> Any:
        value: Any = record.evaluation
        for key in keys:
            value = (value or {}).get(key)
        return value

    def shared(*keys: str) -> list[Any]:
        return [entry(record, *keys) for record in records]

    lines = [
        _line(t("State"), [record.status and record.status.state for record in records], t),
        _line(t("base model"), [_model(record) for record in records], str),
        _line(t("steps"), [curve.last_step or None for curve in curves], str),
        _figures(t("last training loss"), last, "{:.3f}"),
        _figures(t("held-out loss, before"), shared("before", "loss"), "{:.3f}", None),
        _figures(t("held-out loss, after"), shared("after", "loss"), "{:.3f}", min),
        _figures("ROUGE-L", shared("after", "scores", "held_out", "rouge-l"), "{:.1f}", max),
        _figures("BLEU-4", shared("after", "scores", "held_out", "bleu-4"), "{:.1f}", max),
        _shares(t("Prompts met"), met),
        _figures(t("guard loss, before"), shared("before", GUARD, "loss"), "{:.3f}", None),
        _figures(t("guard loss, after"), shared("after", GUARD, "loss"), "{:.3f}", min),
        _shares(t("guard set, right answers"), guarded),
        _figures(t("tokens per second"), [timing.throughput(c) for c in curves], "{:,.0f}", max),
        _timed(t("Time"), seconds),
        _line(t("cost"), [item.total if item else None for item in spent], str),
        _line(t("Merge proof"), [_passed(r.proof) for r in records], t),
        _line(t("Prompt parity"), [_passed(r.parity) for r in records], t),
        _line("LLaMA-Factory", [r.versions.get("llamafactory") for r in records], str),
        _line("lock", [str(r.versions.get("lock_sha256") or "")[:12] for r in records], str),
    ]
    return [line for line in lines if any(value != "–" for value in line.values)]


def _line(label: str, values: Sequence[Any], t: Callable[[str], str]) -> Line:
    return Line(label, tuple(t(str(v)) if v not in (None, "") else "–" for v in values))


def _figures(
    label: str,
    values: Sequence[float | None],
    shape: str,
    best: Callable[[list[float]], float] | None = None,
) -> Line:
    values_known = [value for value in values if value is not None]
    found = best(values_known) if best and len(set(values_known)) > 1 else None
    texts = tuple("–" if value is None else shape.format(value) for value in values)
    return Line(label, texts, None if found is None else list(values).index(found))


def _shares(label: str, values: Sequence[tuple[int, int] | None]) -> Line:
    shares = [None if value is None else value[0] / value[1] for value in values]
    found = _figures(label, shares, "{}", max)
    texts = tuple("–" if value is None else f"{value[0]} / {value[1]}" for value in values)
    return Line(label, texts, found.best)


def _timed(label: str, values: Sequence[float | None]) -> Line:
    found = _figures(label, values, "{}", min)
    texts = tuple("–" if value is None else formats.duration(value) for value in values)
    return Line(label, texts, found.best)


def _passed(record: Row) -> str | None:
    if not record:
        return None
    return "passed" if record.get("passed") else "accepted" if record.get("accepted") else "failed"


def _model(record: Record) -> str:
    return (record.run.model.name if record.run.model else None) or ""


def _parameters(records: Sequence[Record]) -> list[Line]:
    """Return the config keys in which the runs differ."""
    keys = dict.fromkeys(key for record in records for key in record.config)
    lines = []
    for key in keys:
        values = [record.config.get(key) for record in records]
        if key not in _OWN and any(value != values[0] for value in values):
            lines.append(Line(key, tuple("–" if v is None else sections.plain(v) for v in values)))
    return lines


def _asked(records: Sequence[Record]) -> list[ComparedPrompt]:
    rows: dict[tuple[str, str], dict[int, Row]] = {}
    for place, record in enumerate(records):
        for row in record.after:
            key = str(row.get("set", "")), str(row.get("prompt", ""))
            rows.setdefault(key, {})[place] = row
    order = {"prompts": 0, GUARD: 2}
    return [
        ComparedPrompt(
            prompt,
            str(next(iter(found.values())).get("reference") or ""),
            tuple(answers.answer(found.get(place)) for place in range(len(records))),
        )
        for (name, prompt), found in sorted(rows.items(), key=lambda item: order.get(item[0][0], 1))
        if name != GUARD
    ]


def _warnings(records: Sequence[Record], t: Translator) -> list[str]:
    """Return warnings about values of these runs that cannot be compared."""
    found = []
    held = {
        (
            tuple(str(item.sha256) for item in record.run.data),
            str(record.config.get("val_size")),
            str(record.config.get("eval_dataset")),
            str(record.config.get("seed")),
        )
        for record in records
    }
    if len(held) > 1:
        found.append(
            t("The held-out rows are not the same ones: their losses say little of each other.")
        )
    if len({str(record.config.get("template")) for record in records}) > 1:
        found.append(t("The templates differ: losses are of other tokens."))
    if len({_model(record) for record in records}) > 1:
        found.append(t("The base models differ: losses are of other tokens."))
    return found
