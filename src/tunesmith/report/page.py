"""The page: everything a run folder holds, as one self-contained HTML file, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader, Template
from markupsafe import Markup

from tunesmith.core import formats
from tunesmith.core.files import write_text
from tunesmith.core.printable import printable
from tunesmith.report import answers, sections, timing
from tunesmith.report.curve import Curve, read_curve
from tunesmith.report.diagnosis import diagnose, facts_of
from tunesmith.report.i18n import LANGUAGES, checked_language, translator
from tunesmith.report.picture import NARROW, as_svg, write_png
from tunesmith.report.record import GUARD, Record, read_record

PAGE = "report.html"
MARKDOWN = "report.md"
PICTURE = "training_loss.png"


def write_report(run_dir: Path, *, language: str = "en") -> Path:
    """Write report.html, report.md and training_loss.png into the run folder; return the page.

    The page needs no network and no JavaScript. Whatever the folder lacks is named on it,
    with the command that gets it. Raises UsageError where run.json is missing or the
    language (en, zh) is not known; nothing is written then.
    """
    checked_language(language)
    record = read_record(run_dir)
    curve = read_curve(record.events)
    pictures = (as_svg(curve, language=language), as_svg(curve, size=NARROW, language=language))
    page = render(record, curve, pictures, language)
    write_png(curve, run_dir / PICTURE, title=record.run_id, language=language)
    write_text(run_dir / MARKDOWN, markdown(record, curve, language))
    write_text(run_dir / PAGE, page)
    return run_dir / PAGE


def render(record: Record, curve: Curve, pictures: tuple[str, str], language: str = "en") -> str:
    """Return the page as HTML text. `pictures` are SVG for a wide and for a narrow screen."""
    return template("report.html.j2").render(
        _view(record, curve, language),
        # Our own drawing: no text of a run gets into it.
        wide=Markup(pictures[0]),  # noqa: S704
        narrow=Markup(pictures[1]),  # noqa: S704
    )


def markdown(record: Record, curve: Curve, language: str = "en") -> str:
    """Return the same as Markdown, for a pull request or a model card."""
    text = template("report.md.j2").render(_view(record, curve, language))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _shown(value: object) -> object:
    """What a page shows of a value: people print pages to terminals, too."""
    return printable(value) if type(value) is str else value


def _cell(value: object) -> str:
    """Other people's text in a cell of a Markdown table: no markup of its own, one line."""
    text = re.sub(r"([\\`*_\[\]|])", r"\\\1", printable(str(value)).strip())
    return "<br>".join(text.replace("&", "&amp;").replace("<", "&lt;").splitlines())


def _code(value: object) -> str:
    """Other people's text as Markdown's code, in a table too: it cannot end its own fence."""
    text = " ".join(printable(str(value)).split()).replace("|", r"\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


@cache
def template(name: str) -> Template:
    """Return one of our templates, ready to render."""
    environment = Environment(
        loader=PackageLoader("tunesmith", "report"),
        # Prompts and answers are other people's text, and a model's.
        autoescape=name.endswith(".html.j2"),
        # Any key of any file may be absent: its place stays empty.
        undefined=ChainableUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        cell=_cell,
        code=_code,
        printable=printable,
        bytes=formats.size,
        duration=formats.duration,
        figure=_figure,
    )
    return environment.get_template(name)


def _view(record: Record, curve: Curve, language: str) -> dict[str, Any]:
    t = translator(language)
    times = timing.phase_times(record.events)
    phases = record.status.phases if record.status else {}
    compared = answers.comparisons(record)
    facts = facts_of(record.run, record.config, phases, record.evaluation)
    return {
        "t": t,
        "lang": LANGUAGES[language],
        "record": record,
        "curve": curve,
        "title": record.run.title or record.run.stem or record.run_id,
        "headlines": sections.headlines(record, times, t),
        "abstract": sections.abstract(record, t),
        "comparisons": [item for item in compared if item.name != GUARD],
        "guard": next((item for item in compared if item.name == GUARD), None),
        "guard_scores": answers.scores(record, GUARD, t),
        "held_out_scores": answers.scores(record, "held_out", t),
        "parity_renderers": answers.parity_renderers(record),
        "cost": timing.cost(record, times),
        "advice": diagnose(curve, facts, language),
        "parameters": sections.parameters(record),
        "data": sections.data_statistics(record, t),
        "times": times,
        "starts": timing.starts(record.events, t),
        "throughput": timing.throughput(curve),
        "notes": sections.notes(record, curve, t),
        "commands": sections.commands(record),
    }


def _figure(value: object) -> str:
    """A figure in four digits (0.0312, 1.834, 273,855,969); parts of a nested one by name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_figure(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_figure(item) for item in value) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e6):
        return f"{value:.4g}"
    return f"{int(value):,}" if abs(value) >= 1e5 else str(int(value))
