"""What a watcher sees: plain lines in a pipe, and events in words."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tunesmith.cli.follow import curve, event_text, follow, training_line
from tunesmith.job.run.codec import decode
from tunesmith.job.run.events import Event, PhaseEnded, PhaseStarted
from tunesmith.job.run.schema import RunStatus
from tunesmith.plan.target import RunUpdate

pytestmark = pytest.mark.unit


class Recorded:
    """A target whose run was recorded: what it says at each look."""

    name = "recorded"

    def __init__(self, looks: Sequence[tuple[RunStatus, list[Event]]]) -> None:
        self._looks = list(looks)

    def watch(self, _run_id: str, offset: int = 0) -> Iterator[RunUpdate]:
        for number, (status, events) in enumerate(self._looks, 1):
            yield RunUpdate(status, tuple(events), offset + number, "", 0)


STATUS = RunStatus(
    state="running",
    phase="train",
    step=3,
    total_steps=9,
    loss=1.5,
    learning_rate=1e-4,
    tokens_per_second=99.6,
    eta_seconds=125,
)


def test_plain_lines_in_a_pipe() -> None:
    started = PhaseStarted(phase="train", attempt=2)
    ended = PhaseEnded(phase="train", state="succeeded", seconds=61.2)
    done = replace(STATUS, state="succeeded")
    target = Recorded([(STATUS, [started]), (done, [ended])])
    out = io.StringIO()
    last = follow(target, "r", Console(file=out, width=200))  # type: ignore[arg-type]
    assert last == done
    assert out.getvalue().splitlines() == [
        "training (attempt 2)",
        "step 3/9  loss 1.5000  lr 1.00e-04  100 tok/s  ETA 2 min 05 s",
        "train: succeeded after 1 min 01 s",
    ]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "resumed", "step": 5, "total_steps": 9}, "resumed at step 5/9"),
        (
            {"event": "changed", "what": "bf16", "from": True, "to": False, "why": "no GPU"},
            "bf16: True -> False (no GPU)",
        ),
        ({"event": "paused", "why": "/x is full"}, "paused: /x is full"),
        ({"event": "log", "step": 1}, None),
    ],
)
def test_events_in_words(event: dict[str, Any], words: str | None) -> None:
    assert event_text(decode(Event, event)) == words


def test_what_is_not_known_is_not_shown() -> None:
    assert training_line(RunStatus(state="running")) == ""


def test_the_curve_falls_with_the_loss() -> None:
    assert curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve([float("nan"), 4.0, 1.0]) == "█▁"
    assert curve([2.0]) == ""
    long = curve([100 - step for step in range(100)], width=10)
    assert (len(long), long[0], long[-1]) == (10, "█", "▁")
    assert list(long) == sorted(long, reverse=True)
