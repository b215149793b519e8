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
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
)

from tunesmith.core import formats
from tunesmith.core.printable import printable
from tunesmith.job.run import events
from tunesmith.job.run.schema import GpuFigures, RunStatus
from tunesmith.plan.target import Target

_BLOCKS = "▁▂▃▄▅▆▇█"
# In a pipe: one line a second at most, however fast the steps are.
_LINE_SECONDS = 1.0


@dataclass(frozen=True)
class Detached:
    """The watcher left; the run goes on."""

    run_id: str


def follow(target: Target, run_id: str, console: Console, offset: int = 0) -> RunStatus | Detached:
    """Show a run from byte `offset` of its events until it ends; return its last status."""
    view = _Bar(console) if console.is_terminal else _Lines(console)
    lost_at: float | None = None
    with view:
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
                for event in look.events:
                    view.event(event)
                view.status(look.status)
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


class _Lines:
    """Plain lines, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said_at = 0.0
        self._said_step: int | None = None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def event(self, event: events.Event) -> None:
        if text := event_text(event):
            self.say(text)

    def status(self, status: RunStatus) -> None:
        step = status.step
        due = time.monotonic() - self._said_at >= _LINE_SECONDS
        if status.phase == "train" and step and step != self._said_step and due:
            self._said_at, self._said_step = time.monotonic(), step
            self.say(f"step {step}/{status.total_steps}  {training_line(status)}")

    def say(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class _Bar:
    """A progress bar a phase, with what matters beside it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<8}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}", markup=False),
            console=console,
        )
        self._task: TaskID | None = None
        self._phase: str | None = None
        self._losses: dict[int, float] = {}

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def event(self, event: events.Event) -> None:
        if isinstance(event, events.Log) and isinstance(event.loss, float):
            # By step: after a resume some are told twice.
            self._losses[event.step] = event.loss
        # What a phase reads is compared before it starts.
        phase = event.phase if isinstance(event, events.PhaseStarted | events.Progress) else None
        if phase and phase != self._phase:
            self._phase = phase
            self._task = self._progress.add_task(phase, total=None, line="")
        elif isinstance(event, events.Progress) and self._task is not None:
            self._progress.update(
                self._task, completed=event.done, total=event.total, line=event.unit
            )
        elif isinstance(event, events.PhaseEnded) and self._task is not None:
            line = f"{event.state} after {formats.duration(event.seconds)}"
            task = next(t for t in self._progress.tasks if t.id == self._task)
            total = task.total or task.completed or 1
            done = total if event.state == "succeeded" else task.completed
            self._progress.update(self._task, completed=done, total=total, line=line)
        if text := event_text(event):
            self.say(text)

    def say(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False)

    def status(self, status: RunStatus) -> None:
        if status.phase == "train" == self._phase and self._task is not None:
            self._progress.update(
                self._task,
                completed=status.step or 0,
                total=status.total_steps,
                line=f"{curve([*self._losses.values()])} {training_line(status)}".strip(),
            )
