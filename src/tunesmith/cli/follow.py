"""Watch a run from outside: a bar on a terminal, plain lines in a pipe.

Only the target's Protocol is used, so a run on a host looks the same as one here.
Ctrl-C ends the watching, never the run.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
from tunesmith.plan.target import Target

_BLOCKS = "▁▂▃▄▅▆▇█"
# In a pipe: one line a second at most, however fast the steps are.
_LINE_SECONDS = 1.0


@dataclass(frozen=True)
class Detached:
    """The watcher left; the run goes on."""

    run_id: str


def follow(
    target: Target, run_id: str, console: Console, offset: int = 0
) -> dict[str, Any] | Detached:
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


def training_line(status: dict[str, Any]) -> str:
    """Return loss, learning rate, throughput and time left, as far as they are known."""
    parts = []
    if status.get("loss") is not None:
        parts.append(f"loss {status['loss']:.4f}")
    if status.get("learning_rate") is not None:
        parts.append(f"lr {status['learning_rate']:.2e}")
    if status.get("tokens_per_second"):
        parts.append(f"{status['tokens_per_second']:.0f} tok/s")
    if status.get("eta_seconds") is not None:
        parts.append(f"ETA {formats.duration(status['eta_seconds'])}")
    parts += [gpu_line(gpu) for gpu in status.get("gpu") or ()]
    price = status.get("price")
    if price and isinstance(price, int | float) and status.get("worked_seconds"):
        parts.append(f"cost {status['worked_seconds'] / 3600 * price:.2f}")
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


def gpu_line(gpu: dict[str, Any]) -> str:
    """Return a GPU's memory in use and its utilisation, as far as the driver tells them."""
    parts = ["GPU"]
    used, total, busy = (gpu.get(k) for k in ("memory_used", "memory_total", "utilisation"))
    if used is not None and total is not None:
        parts.append(f"{used / 2**30:.1f}/{total / 2**30:.0f} GiB")
    if busy is not None:
        parts.append(f"{busy:.0f}%")
    return " ".join(parts)


def told(event: dict[str, Any]) -> str | None:
    """Return an event in words; None for one that the bar or the lines show themselves."""
    words: dict[str, Callable[[], str | None]] = {
        "damaged_line": lambda: (
            f"events.jsonl: the line at byte {event.get('byte')} is damaged and left out: "
            f"{event.get('why')}"
        ),
        "run_started": lambda: _begun(event),
        "phase_started": lambda: _started(event),
        "phase_ended": lambda: (
            f"{event['phase']}: {event['state']} after {formats.duration(event.get('seconds', 0))}"
        ),
        "resumed": lambda: f"resumed at step {event['step']}/{event.get('total_steps')}",
        "discarded": lambda: f"set {event['checkpoint']} aside: {event['why']}",
        "changed": lambda: (
            f"{event['what']}: {event.get('from')} -> {event.get('to')} ({event.get('why')})"
        ),
        "paused": lambda: f"paused: {event.get('why')}",
        "continued": lambda: "continued",
        "failure": lambda: f"{event['failure']}: {event['message']}",
        "restarting": lambda: f"starting {event['phase']} again after: {event['why']}",
        "eval": lambda: f"step {event['step']}: held-out loss {_figure(event['loss'])}",
        "note": lambda: str(event["text"]),
        "queued": lambda: f"queued behind {', '.join(event['ahead'])}",
        "limit": lambda: f"{event['what']} reached: stopping after a checkpoint",
        "after_command": lambda: str(event["text"]),
        "after_command_ended": lambda: _after(event),
    }
    return words[event["event"]]() if event["event"] in words else None


def _begun(event: dict[str, Any]) -> str | None:
    cause, phases = event.get("cause"), event.get("phases") or ()
    return f"started ({cause}): {', '.join(phases)}" if cause else None


def _figure(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.4f}"


def _after(event: dict[str, Any]) -> str:
    if event["code"] is None:
        return f"not done: {event.get('why')}"
    return "done" if event["code"] == 0 else f"it failed with exit code {event['code']}"


def _started(event: dict[str, Any]) -> str:
    names = {
        "fetch": "fetching the base model",
        "before": "measuring the base model",
        "train": "training",
        "after": "measuring the trained model",
        "merge": "merging the adapter into the base model",
        "proof": "proving the merged model",
        "predict": "predicting",
    }
    attempt = event.get("attempt", 1)
    again = f" (attempt {attempt})" if attempt > 1 else ""
    return f"{names.get(event['phase'], event['phase'])}{again}"


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

    def event(self, event: dict[str, Any]) -> None:
        if text := told(event):
            self.say(text)

    def status(self, status: dict[str, Any]) -> None:
        step = status.get("step")
        due = time.monotonic() - self._said_at >= _LINE_SECONDS
        if status.get("phase") == "train" and step and step != self._said_step and due:
            self._said_at, self._said_step = time.monotonic(), step
            self.say(f"step {step}/{status.get('total_steps')}  {training_line(status)}")

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

    def event(self, event: dict[str, Any]) -> None:
        if event["event"] == "log" and isinstance(event.get("loss"), float) and "step" in event:
            # By step: after a resume some are told twice.
            self._losses[event["step"]] = event["loss"]
        # What a phase reads is compared before it starts.
        begins = event["event"] in ("phase_started", "progress")
        if begins and event["phase"] != self._phase:
            self._phase = event["phase"]
            self._task = self._progress.add_task(event["phase"], total=None, line="")
        elif event["event"] == "progress" and self._task is not None:
            done, total = event["done"], event["total"]
            self._progress.update(self._task, completed=done, total=total, line=event["unit"])
        elif event["event"] == "phase_ended" and self._task is not None:
            line = f"{event['state']} after {formats.duration(event.get('seconds', 0))}"
            task = next(t for t in self._progress.tasks if t.id == self._task)
            total = task.total or task.completed or 1
            done = total if event["state"] == "succeeded" else task.completed
            self._progress.update(self._task, completed=done, total=total, line=line)
        if text := told(event):
            self.say(text)

    def say(self, text: str) -> None:
        self._progress.console.print(printable(text), markup=False, highlight=False)

    def status(self, status: dict[str, Any]) -> None:
        if status.get("phase") == "train" == self._phase and self._task is not None:
            self._progress.update(
                self._task,
                completed=status.get("step") or 0,
                total=status.get("total_steps"),
                line=f"{curve([*self._losses.values()])} {training_line(status)}".strip(),
            )
