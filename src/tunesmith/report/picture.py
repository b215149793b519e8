"""The curve as a picture: a PNG beside the run, an SVG inside the page.

Figures are built without pyplot, so nothing is global and nothing needs a display.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tunesmith.core.files import replacing
from tunesmith.report.curve import Curve, smoothed
from tunesmith.report.i18n import translator

WIDE = (9.0, 6.0)  # inches at 100 dpi: 900 x 600 px
NARROW = (4.2, 4.4)  # for a telephone: the same text size on less paper
DPI = 100

# Each colour stands for a role. The SVG replaces them by the page's own variables, so one
# picture serves the light and the dark theme; the PNG shows them as they are, on white.
INK, TRAIN, VALIDATION, RATE = "#1f2430", "#2f6690", "#c1572f", "#6b7280"
# One colour a run where several are compared; the line styles t them apart without colour.
LINES = (TRAIN, VALIDATION, "#3d7a52", "#7a4fa3", "#8a6d14", "#5b6573")
_STYLES = ("-", "--", "-.", ":")
_ROLES = {
    INK: "currentColor",
    TRAIN: f"var(--train, {TRAIN})",
    VALIDATION: f"var(--validation, {VALIDATION})",
    RATE: f"var(--rate, {RATE})",
    **{colour: f"var(--line-{n}, {colour})" for n, colour in enumerate(LINES) if n > 1},
}
_CHINESE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # the first face of Debian's NotoSansCJK.ttc, the one matplotlib reads
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
)
_CHINESE_FILES = re.compile(r"(?i)cjk|sourcehansans|pingfang|msyh|wqy")
MANY_POINTS = 400  # more dots than this run into one another: a thin line shows more
MANY_CHECKPOINTS = 40


def draw(
    curve: Curve,
    *,
    title: str = "",
    size: tuple[float, float] = WIDE,
    language: str = "en",
) -> Figure:
    """Return the figure: losses above, learning rate below, `size` in inches at 100 dpi."""
    t = translator(language)
    with rc_context(_style()):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        if title:
            # A title is somebody's text: "$" in it is no formula.
            upper.set_title(title, loc="left", fontsize=11, pad=12, parse_math=False)
        _draw_losses(upper, curve, t)
        _draw_rate(lower, curve, t)
        for axes in (upper, lower):
            _calm(axes)
        lower.set_xlim(0, max(curve.total_steps or 0, curve.last_step, 1) * 1.015)
    return figure


def write_png(curve: Curve, path: Path, *, title: str = "", language: str = "en") -> None:
    """Write the picture as a 900 x 600 PNG on white, whole or not at all."""
    with rc_context(_style()), replacing(path) as part:
        draw(curve, title=title, language=language).savefig(part, format="png", facecolor="white")


def as_svg(curve: Curve, *, size: tuple[float, float] = WIDE, language: str = "en") -> str:
    """Return an <svg> element to put into a page; its colours follow the page's theme.

    Text stays text, in the page's font. Ids are unique to this curve and size, so several
    pictures can stand in one page.
    """
    label = translator(language)("Training and validation loss by step, learning rate below")
    return _svg(lambda: draw(curve, size=size, language=language), label)


def compared_svg(
    curves: Mapping[str, Curve], *, size: tuple[float, float] = WIDE, language: str = "en"
) -> str:
    """Return an <svg> of several runs' losses: each run's trend and its validation."""
    t = translator(language)

    def drawn() -> Figure:
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for number, (name, curve) in enumerate(curves.items()):
            colour = LINES[number % len(LINES)]
            style = _STYLES[number // len(LINES) % len(_STYLES)]
            points = curve.finite
            if points:
                steps, losses = smoothed([p.step for p in points], [p.loss for p in points])
                axes.plot(steps, losses, color=colour, linewidth=2, linestyle=style, label=name)
            evals = [point for point in curve.evals if math.isfinite(point.loss)]
            axes.plot(
                [point.step for point in evals],
                [point.loss for point in evals],
                color=colour,
                linestyle=":",
                linewidth=1.1,
                marker="D",
                markersize=4,
            )
        axes.set_ylabel(t("loss (nat/token)"))
        axes.set_xlabel(t("step"))
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right", frameon=False, labelcolor=INK, handlelength=2.2)
        _calm(axes)
        return figure

    return _svg(drawn, t("Training and validation loss of the runs by step"))


def _svg(draw_figure: Callable[[], Figure], label: str) -> str:
    with rc_context(_style() | {"svg.fonttype": "none", "svg.hashsalt": "tunesmith"}):
        buffer = io.StringIO()
        figure = draw_figure()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()  # no XML header: the element goes into HTML
    # Its <style> would hold for the whole page, its fixed size would not fit a telephone.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    for colour, role in _ROLES.items():
        svg = svg.replace(colour, role)
    mark = "c" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" stroke-linejoin="round" ', 1)


def _draw_losses(axes: Axes, curve: Curve, t: Callable[[str], str]) -> None:
    points = curve.finite
    steps, losses = [p.step for p in points], [p.loss for p in points]
    few = len(points) <= MANY_POINTS
    if points:
        axes.plot(
            steps,
            losses,
            color=TRAIN,
            alpha=0.5,
            linestyle="none" if few else "-",
            linewidth=0.6,
            marker="o" if few else "",
            markersize=4.2,
            markeredgewidth=0,
            label=t("training, each log"),
        )
        trend_steps, trend = smoothed(steps, losses)
        axes.plot(trend_steps, trend, color=TRAIN, linewidth=2, label=t("training, smoothed"))
    else:
        note = t("No loss was logged.")
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color=INK, alpha=0.7)
    evals = [point for point in curve.evals if math.isfinite(point.loss)]
    if evals:
        axes.plot(
            [point.step for point in evals],
            [point.loss for point in evals],
            color=VALIDATION,
            linewidth=1.2,
            marker="D",
            markersize=4.5,
            label=t("validation"),
        )
    _mark_broken(axes, curve, t)
    _mark_checkpoints(axes, curve, t)
    _mark_resumes(axes, curve, t)
    axes.set_ylabel(t("loss (nat/token)"))
    low = min([*losses, *(point.loss for point in evals)], default=0.0)
    if low >= 0:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right", frameon=False, labelcolor=INK, handlelength=1.6)


def _mark_broken(axes: Axes, curve: Curve, t: Callable[[str], str]) -> None:
    """Losses that were not numbers, as crosses at the top edge."""
    broken = [point.step for point in curve.train if not math.isfinite(point.loss)]
    if broken:
        axes.plot(
            broken,
            [0.98] * len(broken),
            transform=axes.get_xaxis_transform(),
            color=VALIDATION,
            linestyle="none",
            marker="x",
            label=t("loss not a number"),
        )


def _mark_checkpoints(axes: Axes, curve: Curve, t: Callable[[str], str]) -> None:
    """Saved checkpoints, as small triangles standing on the step axis."""
    if curve.checkpoints:
        every = -(-len(curve.checkpoints) // MANY_CHECKPOINTS)
        steps = [checkpoint.step for checkpoint in curve.checkpoints[::every]]
        axes.plot(
            steps,
            [0.018] * len(steps),
            transform=axes.get_xaxis_transform(),
            color=INK,
            alpha=0.55,
            linestyle="none",
            marker="^",
            markersize=4.5,
            clip_on=False,
            label=t("checkpoint"),
        )


def _mark_resumes(axes: Axes, curve: Curve, t: Callable[[str], str]) -> None:
    for resume in curve.resumes:
        # Three quarters high: the legend stands above.
        axes.axvline(
            resume.step, 0, 0.72, color=INK, alpha=0.55, linewidth=0.9, linestyle=(0, (4, 3))
        )
        axes.annotate(
            t("resumed at step {step}").format(step=resume.step),
            (resume.step, 0.06),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=INK,
            alpha=0.75,
        )


def _draw_rate(axes: Axes, curve: Curve, t: Callable[[str], str]) -> None:
    known = [(p.step, p.learning_rate) for p in curve.train if p.learning_rate is not None]
    axes.plot([step for step, _ in known], [rate for _, rate in known], color=RATE, linewidth=1.4)
    highest = max((rate for _, rate in known), default=0.0) or 1.0
    axes.set_ylim(0, highest * 1.15)
    axes.set_yticks([0, highest], ["0", as_rate(highest)])
    axes.set_ylabel(t("rate"))
    axes.set_xlabel(t("step"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 2.5, 5, 10]))


def as_rate(rate: float) -> str:
    """Return a learning rate as people write it: 1e-4, 2.5e-5."""
    digits, exponent = f"{rate:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _calm(axes: Axes) -> None:
    """Only the lines a reader needs: left and bottom axis, a faint horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_alpha(0.35)
    axes.tick_params(width=0.6, length=3)
    axes.grid(visible=True, axis="y", color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)


def _style() -> dict[Any, Any]:
    return {
        "font.family": ["DejaVu Sans", *_installed_chinese()],
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.fontsize": 9,
    }


@cache
def _installed_chinese() -> tuple[str, ...]:
    """Chinese fonts of this machine; naming one that is absent makes matplotlib warn."""
    found = _known_chinese()
    if not found:
        # matplotlib lists the fonts once and keeps the list: it misses what was installed since.
        for file in font_manager.findSystemFonts():
            if _CHINESE_FILES.search(Path(file).name):
                font_manager.fontManager.addfont(file)
        found = _known_chinese()
    return found


def _known_chinese() -> tuple[str, ...]:
    names = set(font_manager.get_font_names())
    return tuple(name for name in _CHINESE_FONTS if name in names)
