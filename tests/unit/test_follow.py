"""What a watcher sees: plain lines in a pipe, and events in words."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tunesmith.cli.follow import _View, curve, event_text, follow, training_line
from tunesmith.core import progress
from tunesmith.job.run.codec import decode
from tunesmith.job.run.events import Event, Log, PhaseEnded, PhaseStarted, Progress
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


def lines_of(looks: Sequence[tuple[RunStatus, list[Event]]]) -> list[str]:
    out = io.StringIO()
    follow(Recorded(looks), "r", Console(file=out, width=200))  # type: ignore[arg-type]
    return out.getvalue().splitlines()


def log(step: int, loss: float) -> Log:
    return Log(phase="train", step=step, total_steps=9, loss=loss)


def test_the_last_step_is_told_though_the_next_phase_has_begun() -> None:
    after = replace(STATUS, phase="after")
    ended = PhaseEnded(phase="train", state="succeeded", seconds=9.0)
    looks: list[tuple[RunStatus, list[Event]]] = [
        (STATUS, [PhaseStarted(phase="train"), log(3, 1.5)]),
        (after, [log(4, 1.2), log(9, 0.5), ended, PhaseStarted(phase="after")]),
        (replace(after, state="succeeded"), []),
    ]
    steps = [line.partition("  lr")[0] for line in lines_of(looks) if line.startswith("step")]
    assert steps == ["step 3/9  loss 1.5000", "step 9/9  loss 0.5000"]


def test_a_client_that_comes_in_the_middle_sees_where_the_training_is() -> None:
    done = replace(STATUS, state="succeeded")
    ended = PhaseEnded(phase="train", state="succeeded", seconds=9.0)
    lines = lines_of([(STATUS, []), (STATUS, []), (done, [log(3, 1.5), ended]), (done, [])])
    assert [line.partition("  ")[0] for line in lines] == [
        "step 3/9",
        "train: succeeded after 9.0 s",
    ]


def test_a_status_that_is_ahead_of_its_events_waits_for_them() -> None:
    out = io.StringIO()
    with progress.Display(Console(file=out, width=200)) as display:
        view = _View(display)
        ended = PhaseEnded(phase="before", state="succeeded", seconds=20.0)
        first, last = PhaseStarted(phase="before"), PhaseStarted(phase="train")
        view.update(RunUpdate(STATUS, (first,), 0, "", 0, more=True))
        view.update(RunUpdate(STATUS, (ended, last), 0, "", 0))
    assert [line.partition("  ")[0] for line in out.getvalue().splitlines()] == [
        "measuring the base model",
        "before: succeeded after 20 s",
        "training",
        "step 3/9",
    ]


def test_a_phase_without_steps_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = RunStatus(state="running", phase="before")
    now = [0.0]
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def looks() -> Iterator[tuple[RunStatus, list[Event]]]:
        yield before, [PhaseStarted(phase="before")]
        for done in range(1, 11):
            now[0] = 3.0 * done
            yield before, [Progress(phase="before", done=done, total=10, unit="prompts")]
        yield replace(before, state="succeeded"), []

    out = io.StringIO()
    target = Recorded(())
    target._looks = looks()  # type: ignore[assignment]
    follow(target, "r", Console(file=out, width=200))  # type: ignore[arg-type]
    assert out.getvalue().splitlines() == [
        "measuring the base model",
        "before: 4 of 10 prompts (40 %)  ETA 18 s",
        "before: 8 of 10 prompts (80 %)  ETA 6.0 s",
    ]


def test_a_phase_has_gone_on_since_it_began_not_since_one_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = RunStatus(state="running", phase="merge", updated=1060.0)
    now = [5.0]
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 3600.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.Display(Console(file=out, width=200)) as display:
        started = PhaseStarted(phase="merge", time=1000.0)
        _View(display).update(RunUpdate(status, (started,), 0, "", 0))
        now[0] += 10.0
        display.look()
    assert out.getvalue().splitlines()[1] == "merge: 1 min 10 s"


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
