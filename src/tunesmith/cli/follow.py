"""Watch a run from outside: a bar on a terminal, plain lines in a pipe.

Only the target's Protocol is used, so a run on a host looks the same as one here.
Ctrl-C ends the watching, never the run.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from tunesmith.core import formats
from tunesmith.core.progress import LINE_SECONDS, Display, Row
from tunesmith.job.run import events
from tunesmith.job.run.schema import GpuFigures, RunStatus
from tunesmith.plan.target import RunUpdate, Target

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Detached:
    """The watcher left; the run goes on."""

    run_id: str


def follow(target: Target, run_id: str, console: Console, offset: int = 0) -> RunStatus | Detached:
    """Show a run from byte `offset` of its events until it ends; return its last status."""
    lost_at: float | None = None
    with Display(console) as display:
        view = _View(display)
        try:
            for look in target.watch(run_id, offset):
                if look.lost is not None:
                    if lost_at is None:
                        lost_at = time.monotonic()
                        view.say(f"{look.lost}; the run goes on, looking for the host ...")
                    continue
                if lost_at is not None:
                    view.say(f"back after {formats.duration(time.monotonic() - lost_at)}")
                    lost_at = None
                view.update(look)
                if look.over:
                    return look.status
        except KeyboardInterrupt:
            pass
    return Detached(run_id)


def training_line(status: RunStatus) -> str:
    """Return loss, learning rate, throughput and time left, as far as they are known."""
    parts = []
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.learning_rate is not None:
        parts.append(f"lr {status.learning_rate:.2e}")
    if status.tokens_per_second:
        parts.append(f"{status.tokens_per_second:.0f} tok/s")
    if status.eta_seconds is not None:
        parts.append(f"ETA {formats.duration(status.eta_seconds)}")
    parts += [gpu_line(gpu) for gpu in status.gpu or ()]
    price = status.price
    if price and isinstance(price, int | float) and status.worked_seconds:
        parts.append(f"cost {status.worked_seconds / 3600 * price:.2f}")
    return "  ".join(parts)


def curve(losses: Sequence[float], width: int = 20) -> str:
    """Return the losses of a run as one line of blocks, the newest at the right.

    Each block is the mean of its share of the steps; the tallest is the highest loss.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [statistics.fmean(finite[a:b]) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


def gpu_line(gpu: GpuFigures) -> str:
    """Return a GPU's memory in use and its utilisation, as far as the driver tells them."""
    parts = ["GPU"]
    if gpu.memory_used is not None and gpu.memory_total is not None:
        parts.append(f"{gpu.memory_used / 2**30:.1f}/{gpu.memory_total / 2**30:.0f} GiB")
    if gpu.utilisation is not None:
        parts.append(f"{gpu.utilisation:.0f}%")
    return " ".join(parts)


def event_text(event: events.Event) -> str | None:
    """Return an event in words; None for one that the bar or the lines show themselves."""
    match event:
        case events.DamagedLine():
            return (
                f"events.jsonl: the line at byte {event.byte} is damaged and left out: {event.why}"
            )
        case events.RunStarted():
            return f"started ({event.cause}): {', '.join(event.phases)}" if event.cause else None
        case events.PhaseStarted():
            return _phase_text(event)
        case events.PhaseEnded():
            return f"{event.phase}: {event.state} after {formats.duration(event.seconds)}"
        case events.Resumed():
            return f"resumed at step {event.step}/{event.total_steps}"
        case events.Discarded():
            return f"set {event.checkpoint} aside: {event.why}"
        case events.Changed():
            return f"{event.what}: {event.before} -> {event.to} ({event.why})"
        case events.Paused():
            return f"paused: {event.why}"
        case events.Continued():
            return "continued"
        case events.Failure():
            return f"{event.failure}: {event.message}"
        case events.Restarting():
            return f"starting {event.phase} again after: {event.why}"
        case events.Evaluated():
            loss = "not a number" if event.loss is None else f"{event.loss:.4f}"
            return f"step {event.step}: held-out loss {loss}"
        case events.Note() | events.CommandAnnounced():
            return event.text
        case events.Queued():
            return f"queued behind {', '.join(event.ahead)}"
        case events.LimitReached():
            return f"{event.what} reached: stopping after a checkpoint"
        case events.CommandEnded():
            return _command_text(event)
        case _:
            return None


def _command_text(event: events.CommandEnded) -> str:
    if event.code is None:
        return f"not done: {event.why}"
    return "done" if event.code == 0 else f"it failed with exit code {event.code}"


def _phase_text(event: events.PhaseStarted) -> str:
    names = {
        "check": "checking the config",
        "fetch": "fetching the base model",
        "before": "measuring the base model",
        "train": "training",
        "after": "measuring the trained model",
        "merge": "merging the adapter into the base model",
        "proof": "proving the merged model",
        "predict": "predicting",
    }
    again = f" (attempt {event.attempt})" if event.attempt > 1 else ""
    return f"{names.get(event.phase, event.phase)}{again}"


class _View:
    """A row of the phase at work, and a line for whatever should stay to be read."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._row: Row | None = None
        self._phase: str | None = None
        self._ended: set[str] = set()
        self._losses: dict[int, float] = {}
        self._log: events.Log | None = None
        self._step_shown = 0

    def say(self, text: str) -> None:
        """Print a line."""
        self._display.say(text)

    def update(self, update: RunUpdate) -> None:
        """Show what has happened, and how far the run is."""
        status = update.status
        for event in update.events:
            if isinstance(event, events.PhaseEnded):
                # The last step may have come between two looks; how long is left, no more.
                if self._log and self._log.step > self._step_shown:
                    self._step(replace(events.with_step(status, self._log), eta_seconds=None))
                self._end(event.phase)
            if text := event_text(event):
                self.say(text)
            self._event(event, status)
        # Until all events are here, the status is ahead of them.
        if status.phase == "train" and "train" not in self._ended and not update.more:
            if self._phase != "train":
                self._begin("train")
            self._step(status)

    def _event(self, event: events.Event, status: RunStatus) -> None:
        match event:
            case events.PhaseStarted():
                # Both by the clock of the machine that works.
                self._begin(event.phase, max(0.0, (status.updated or 0.0) - event.time))
            case events.Progress():
                if event.phase and event.phase != self._phase:
                    # What a phase reads is compared before it starts.
                    self._begin(event.phase)
                if self._row:
                    self._row.moved(event.done, event.total or 0, event.unit)
            case events.Log():
                self._log = event
                if isinstance(event.loss, float):
                    # By step: after a resume some are told twice.
                    self._losses[event.step] = event.loss

    def _begin(self, phase: str, ago: float = 0.0) -> None:
        self._end(self._phase)
        self._ended.discard(phase)
        self._step_shown = 0
        # The line of the phase has just been said.
        self._phase = phase
        self._row = self._display.row(phase, first=LINE_SECONDS, ago=ago)

    def _end(self, phase: str | None) -> None:
        if phase:
            self._ended.add(phase)
        if phase == self._phase:
            if self._row:
                self._row.end()
            self._row = self._phase = self._log = None

    def _step(self, status: RunStatus) -> None:
        """Show a step of the training, in words of its own."""
        if self._phase == "train" and self._row and status.step:
            self._step_shown = status.step
            words = f"step {status.step}/{status.total_steps}  {training_line(status)}"
            drawn = curve([*self._losses.values()])
            self._row.at(words, status.step, status.total_steps or 0, drawn)
