"""Durations, sizes and counts for people, in the same format everywhere.

Used by both halves: standard library only, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Callable


def duration(seconds: float) -> str:
    """Return a duration in at most two units: `44 s`, `3 min 05 s`, `1 h 30 min`, `2 d 03 h`.

    Below ten seconds one decimal is kept, `0.4 s`; nothing is `0 s`.
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours:02d} h"


def size(count: float) -> str:
    """Return a number of bytes in powers of 1000: `512 B`, `3.6 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95 or (unit == "B" and abs(count) < 1000):
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count(number: float) -> str:
    """Return a whole number with groups of three: `12,000`."""
    return f"{number:,.0f}"


def share(done: float, total: float, shown: Callable[[float], str] = size, unit: str = "") -> str:
    """Return how much of all is done: `1.2 GB of 3.6 GB (33 %)`, `6 of 10 prompts (60 %)`.

    Both are written by `shown`; a `total` of 0 is not known and left out.
    """
    if not total:
        return " ".join(filter(None, (shown(done), unit)))
    words = (f"{shown(done)} of {shown(total)}", unit, f"({100 * done / total:.0f} %)")
    return " ".join(filter(None, words))
