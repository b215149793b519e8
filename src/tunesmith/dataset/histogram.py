"""How long the rows are, in tokens: bars for the terminal and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Lengths = Sequence[tuple[int, int]]  # (tokens, rows of that length), ascending


@dataclass(frozen=True)
class Bar:
    """Rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


def quantile(lengths: Lengths, share: float) -> int:
    """Return the smallest length that at least `share` of the rows do not exceed."""
    wanted = math.ceil(share * sum(rows for _, rows in lengths))
    seen = 0
    for length, rows in lengths:
        seen += rows
        if seen >= wanted:
            return length
    return lengths[-1][0] if lengths else 0


def bars(lengths: Lengths, count: int = 16) -> list[Bar]:
    """Return at most `count` bars of one width, a round number; the last holds the longest 1 %."""
    if not lengths:
        return []
    low, longest = lengths[0][0], lengths[-1][0]
    usual = max(quantile(lengths, 0.99), low)
    width = _round_up(max((usual - low + 1) / count, 1))
    start = low // width * width
    found: dict[int, int] = {}
    for length, rows in lengths:
        place = min((length - start) // width, count - 1)
        found[place] = found.get(place, 0) + rows
    made = []
    for place in range(max(found) + 1):
        first = start + place * width
        high = max(longest, first) if place == count - 1 else first + width - 1
        made.append(Bar(first, high, found.get(place, 0)))
    return made


def _round_up(value: float) -> int:
    size = 10 ** math.floor(math.log10(value))
    return next(int(step * size) for step in (1, 2, 4, 5, 8, 10) if step * size >= value)


def terminal(lengths: Lengths, cutoff: int, width: int = 40) -> list[str]:
    """Return the bars as lines of text; those beyond the cutoff are marked."""
    made = bars(lengths)
    most = max((bar.rows for bar in made), default=1)
    digits = len(str(made[-1].high)) if made else 1
    lines = []
    for bar in made:
        blocks = "█" * round(bar.rows / most * width) or ("▏" if bar.rows else "")
        mark = "  > cutoff_len" if bar.low > cutoff else ""
        span = f"{bar.low:>{digits}}-{bar.high:<{digits}}"
        lines.append(f"{span} {blocks} {bar.rows}{mark}".rstrip())
    return lines


def picture(lengths: Lengths, cutoff: int, title: str, path: Path) -> None:
    """Write the histogram as a PNG, 900 x 500, with the cutoff as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tunesmith.core.files import replacing

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    made = bars(lengths, 48)
    for bar in made:
        # The last bar may be wide: it is drawn as wide as the others.
        width = made[0].high - made[0].low + 1
        beyond = bar.low > cutoff
        axes.bar(
            bar.low, bar.rows, width * 0.92, align="edge", color="#c1572f" if beyond else "#2f6690"
        )
    edge = axes.get_xlim()[1]
    if cutoff <= edge:
        axes.axvline(cutoff, color="#c1572f", linewidth=1.2)
        axes.annotate(
            f"cutoff_len {cutoff}",
            (cutoff, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color="#c1572f",
        )
    axes.margins(y=0.14)  # room for the words above the bars
    axes.set_xlabel("tokens of a row before it is cut")
    axes.set_ylabel("rows")
    axes.set_title(title, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path) as part:
        figure.savefig(part, format="png")
