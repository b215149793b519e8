"""docs/performance.md and its pictures, rendered from results.json.

The page is text of the figures alone, so a test can compare it; the pictures are drawn when
benchmarks run. A result's `detail["plots"]` is a list of {"title", "x", "y", "lines": {name:
[[x, y], ...]}}, with "log_x" or "log_y" where that shows more, "limit" for a bar to draw, and
"close" for lines that lie on one another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "pictures"
# By the start of an id, in the order of the page.
SECTIONS = (
    ("doors", "Commands"),
    ("start", "Job start"),
    ("prepare", "Data preparation"),
    ("check", "Data check"),
    ("throughput", "Training throughput"),
    ("merge", "Merge"),
    ("install", "Environment"),
    ("image", "Image"),
    ("provision", "Provisioning"),
    ("drift", "Provisioning"),
    ("cold", "Bytes downloaded"),
    ("end", "End to end"),
    ("", "Others"),
)
HEAD = """\
# Performance

This project compared with the usual alternative. Both sides of a row are measured in one session on
one machine, in turns (A B A B A), and medians are compared; each benchmark also checks that both
sides produce the same result. Times depend on the machine, ratios much less. `make bench` runs all
benchmarks, `make bench ONLY=merge` one of them; both render this page from
`benchmarks/results.json`.

A bar is the goal we set. If it is missed, the row says so, and its section says why.
"""
# Okabe and Ito's colours, which colour-blind people tell apart; each line has its own mark too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKS = ("o", "s", "^", "D")
INK, QUIET = "#1f2430", "#8a8f98"


def main(results: Path) -> None:
    """Write page and pictures."""
    known = json.loads(results.read_text(encoding="utf-8"))
    draw(known["results"])
    PAGE.write_text(page(known["results"]), encoding="utf-8")


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page's text."""
    sections = _sections(results)
    rows = [row for _, found in sections for row in found]
    settings = _settings(rows)
    met = sum(bool(row["met"]) for row in rows)
    lines = [HEAD, f"{met} of {len(rows)} bars are met.", ""]
    if _overview(rows):
        lines += ["![How far each figure is from its bar](pictures/performance_bars.png)", ""]
    lines += ["| what | ours | otherwise | ratio | bar | met | date | setup |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        mark = settings.index(_setting(row)) + 1
        lines.append(
            f"| [{_cell(row['what'])}](#{_anchor(row['id'])}) | "
            f"{_amount(row['ours'], row['unit'])} | "
            f"{_amount(row['other'], row['unit'])} | {_ratio(row)} | {_cell(row['bar'])} | "
            f"{'yes' if row['met'] else '**no**'} | {row['date']} | {mark} |"
        )
    lines.append("")
    for number, (machine, versions) in enumerate(settings, 1):
        shown = ", ".join(f"{name} {version}" for name, version in json.loads(versions).items())
        lines.append(f"{number}. {machine}; {shown}")
    for title, found in sections:
        lines += ["", f"## {title}"]
        for row in found:
            lines += _section(row)
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Mapping[str, Any]]) -> None:
    """Draw the overview and each result's plots anew."""
    for old in PICTURES.glob("performance_*.png"):
        old.unlink()
    rows = [row for _, found in _sections(results) for row in found]
    if bars := _overview(rows):
        _draw_overview(bars)
    for row in rows:
        for number, plot in enumerate(row["detail"].get("plots", ())):
            _draw_plot(plot, PICTURES / _picture(row, number))


def _section(row: Mapping[str, Any]) -> list[str]:
    lines = ["", f"### {row['id']}", "", f"{_sentence(row['what'])}"]
    if row["why"]:
        lines += ["", f"{'Why' if row['met'] else 'Why it is missed'}: {row['why']}."]
    if row["commands"]:
        lines += ["", "```"]
        for side, command in row["commands"].items():
            lines += [f"# {'otherwise' if side == 'other' else side}", *str(command).splitlines()]
        lines += ["```"]
    details = {key: value for key, value in row["detail"].items() if key != "plots"}
    note = details.pop("note", None)
    if details:
        shown = (f"{key.replace('_', ' ')}: {_value(value)}" for key, value in details.items())
        lines += ["", "; ".join(shown) + "."]
    if note:
        lines += ["", _sentence(str(note))]
    for number, plot in enumerate(row["detail"].get("plots", ())):
        lines += ["", f"![{plot['title']}](pictures/{_picture(row, number)})"]
    return lines


def _sections(
    results: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        title = next(title for start, title in SECTIONS if row["id"].startswith(start))
        found.setdefault(title, []).append(row)
    order = list(dict.fromkeys(title for _, title in SECTIONS))
    return [(title, found[title]) for title in order if title in found]


def _settings(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(_setting(row) for row in rows))


def _setting(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["machine"]), json.dumps(row["versions"])


def _overview(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return (id, how many times better than its bar) where the bar is one number."""
    found = []
    for row in rows:
        bar = re.match(r"(<=|>=) ([\d.]+)(x?)", row["bar"])
        if not bar:
            continue
        value = row["ratio"] if bar[3] else row["ours"]
        if not value:
            continue
        share = value / float(bar[2])
        found.append((row["id"], share if bar[1] == ">=" else 1 / share))
    return found


def _amount(value: float | None, unit: str) -> str:
    return "" if value is None else f"{_number(value)} {unit}".strip()


def _number(value: float) -> str:
    if isinstance(value, bool) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ratio(row: Mapping[str, Any]) -> str:
    return "" if row["ratio"] is None else f"{_number(row['ratio'])}x"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_value(item)} ({key})" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, float | int) and not isinstance(value, bool):
        return _number(value)
    return str(value)


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:] if text and text[0].islower() else text
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _anchor(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _picture(row: Mapping[str, Any], number: int) -> str:
    return f"performance_{row['id'].replace('-', '_')}{f'_{number}' if number else ''}.png"


def _draw_overview(bars: Sequence[tuple[str, float]]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, axes = _figure(1.4 + 0.34 * len(bars))
    for place, (_, share) in enumerate(reversed(bars)):
        met = share >= 1
        colour = COLOURS[0] if met else COLOURS[1]
        axes.plot([1, share], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(share, place, MARKS[0] if met else MARKS[3], color=colour, markersize=9)
    axes.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)])
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    shares = [share for _, share in bars]
    axes.set_xlim(min(0.8, min(shares) / 1.3), max(shares) * 1.3)
    axes.set_xlabel("times better than its bar; left of the line: missed")
    _save(figure, axes, PICTURES / "performance_bars.png")


def _draw_plot(plot: Mapping[str, Any], path: Path) -> None:
    figure, axes = _figure(4.2)
    styles = cycle(zip(COLOURS, MARKS, strict=True))
    for (name, points), (colour, mark) in zip(plot["lines"].items(), styles, strict=False):
        across, up = zip(*points, strict=True)
        look = {"color": colour, "linewidth": 2.2, "markersize": 8, "label": name}
        if plot.get("close"):
            # Lines that lie on one another: an open mark shows the one below.
            look |= {"linewidth": 1.2, "markerfacecolor": "none", "markeredgewidth": 1.8}
        axes.plot(across, up, f"{mark}-", **look)
    if (limit := plot.get("limit")) is not None:
        axes.axhline(limit, color=INK, linewidth=1.2, linestyle="--", label="bar")
    for axis, scale in (("x", axes.set_xscale), ("y", axes.set_yscale)):
        if plot.get(f"log_{axis}"):
            scale("log")
        elif axis == "y" and not plot.get("close"):
            axes.set_ylim(bottom=0)
    if plot.get("log_x"):
        places = sorted({point[0] for points in plot["lines"].values() for point in points})
        axes.set_xticks(places, [_short(place) for place in places])
        axes.set_xticks([], minor=True)
    axes.set_title(plot["title"], loc="left", fontsize=14)
    axes.set_xlabel(plot["x"])
    axes.set_ylabel(plot["y"])
    axes.legend(frameon=False)
    _save(figure, axes, path)


def _short(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def _figure(height: float) -> tuple[Any, Any]:
    # Here: the test of the page needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Large letters: the page shows it at half its width.
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="both", color=QUIET, alpha=0.25)
    axes.tick_params(labelsize=12)
    axes.xaxis.label.set_size(13)
    axes.yaxis.label.set_size(13)
    if legend := axes.get_legend():
        for text in legend.get_texts():
            text.set_fontsize(12)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the program's version, so that the same figures give the same file.
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main(ROOT / "benchmarks" / "results.json")
