"""How long a run took, how often it started, and what it cost. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from tunesmith.core import formats
from tunesmith.job.run.events import Event, PhaseEnded, PhaseStarted, RunStarted, Summary
from tunesmith.job.run.schema import Price
from tunesmith.report.curve import Curve
from tunesmith.report.i18n import Translator
from tunesmith.report.record import Record


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Seconds one phase took over all its attempts; `share` of the longest phase, 0 to 1.

    `memory` is what its last process held at most, in words: "3.1 GB, GPU 9.8 GB".
    """

    phase: str
    seconds: float
    share: float
    attempts: int
    state: str
    memory: str = ""


def phase_times(events: tuple[Event, ...]) -> tuple[PhaseTime, ...]:
    """How long each phase took, in the order the phases began.

    A phase whose end was never written (kill -9, power loss) counts up to the last event
    before the run was started again.
    """
    seconds: dict[str, float] = {}
    attempts: dict[str, int] = {}
    states: dict[str, str] = {}
    peaks: dict[str, str] = {}
    phase, began, last = "", 0.0, 0.0

    def close(state: str, until: float) -> None:
        seconds[phase] = seconds.get(phase, 0.0) + max(0.0, until - began)
        states[phase] = state

    for event in events:
        now = event.time or last
        if isinstance(event, PhaseStarted):
            # A second attempt of the same phase goes on within it.
            if phase and phase != event.phase:
                close("ended without a word", last)
                phase = ""
            if not phase:
                phase, began = event.phase, now
            attempts[phase] = attempts.get(phase, 0) + 1
        elif isinstance(event, Summary) and event.peak_memory is not None:
            peaks[str(event.phase)] = _memory(event.peak_memory)
        elif isinstance(event, PhaseEnded) and phase:
            close(event.state, now)
            phase = ""
        elif isinstance(event, RunStarted) and phase:
            close("ended without a word", last)
            phase = ""
        last = now
    if phase:
        close("running", last)
    longest = max(seconds.values(), default=0.0) or 1.0
    return tuple(
        PhaseTime(
            name, spent, spent / longest, attempts.get(name, 1), states[name], peaks.get(name, "")
        )
        for name, spent in seconds.items()
    )


def starts(events: tuple[Event, ...], t: Translator) -> tuple[str, ...]:
    """What has started work on the run each time, and how long after the first event."""
    first = next((event.time for event in events if event.time), 0.0)
    return tuple(
        f"{t(STARTS[event.cause])} ({formats.duration((event.time or first) - first)})"
        for event in events
        if isinstance(event, RunStarted) and event.cause in STARTS
    )


def _memory(peak: Mapping[str, Any]) -> str:
    parts = [formats.size(peak["ram"])] if peak.get("ram") else []
    parts += [f"GPU {formats.size(peak['gpu'])}"] if peak.get("gpu") else []
    return ", ".join(parts)


def throughput(curve: Curve) -> float | None:
    """The median of the logged tokens per second."""
    known = [p.tokens_per_second for p in curve.train if p.tokens_per_second is not None]
    return median(known) if known else None


@dataclass(frozen=True, slots=True)
class Cost:
    """What the phases cost on a host paid by the hour: "3.20 CNY" and "1.88 CNY an hour"."""

    total: str
    rate: str


def cost(record: Record, times: tuple[PhaseTime, ...]) -> Cost | None:
    """Return the cost of all phases; None for a run without a price.

    Counted is the time
    of the phases: what a host cost before, between and after them the run does not know.
    """
    price = record.run.price
    if price is None:
        return None
    rate = price.per_hour if isinstance(price, Price) else price
    unit = (price.currency or "") if isinstance(price, Price) else ""
    hours = sum(item.seconds for item in times) / 3600
    return Cost(f"{hours * rate:.2f} {unit}".strip(), f"{rate:g} {unit}".strip())


STARTS = {
    "user": "by the user",
    "resume": "by a resume",
    "autostart": "by the start of the host",
    "container": "by the restart of its container",
    "queue": "by its turn in the queue",
    "retry": "by a retry",
}
