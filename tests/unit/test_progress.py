"""Work in progress as it is shown: lines in a pipe by a clock of ours, rows on a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from tunesmith.basemodel.fetch import Progress
from tunesmith.cli import base_model, console
from tunesmith.core import formats, progress
from tunesmith.core.progress import _LOOK_SECONDS as LOOK_SECONDS
from tunesmith.core.progress import FIRST_SECONDS, LINE_SECONDS, Display

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _clock_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a pipe would speak by its own clock, between two words of a test."""
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 3600.0)


class Pipe(Display):
    """A display in a pipe, at a time that the test says."""

    def __init__(self) -> None:
        self.now = 100.0
        self._out = io.StringIO()
        super().__init__(Console(file=self._out, width=80), lambda: self.now)

    def at(self, seconds: float) -> None:
        """Let it be so many seconds after the beginning."""
        self.now = 100.0 + seconds
        self.look()

    @property
    def lines(self) -> list[str]:
        return self._out.getvalue().splitlines()


def screen() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=100, legacy_windows=False), out


def test_a_first_sign_and_then_a_line_now_and_then() -> None:
    with Pipe() as pipe:
        row = pipe.row("uploading")
        for second in range(0, 61, 2):
            pipe.now = 100.0 + second
            row.moved(second * 50_000_000, 3_600_000_000)
    assert FIRST_SECONDS + LOOK_SECONDS <= 2 and LINE_SECONDS == 10
    assert len(pipe.lines) == 6
    assert pipe.lines[1] == "uploading: 600.0 MB of 3.6 GB (17 %)  50.0 MB/s  ETA 1 min 00 s"


def test_work_without_a_measure_says_how_long_it_goes_on() -> None:
    with Pipe() as pipe:
        pipe.row("gpu1: loading")
        for second in (1, 2, 3, 11, 12, 13):
            pipe.at(second)
    assert pipe.lines == ["gpu1: loading: 2.0 s", "gpu1: loading: 12 s"]


def test_what_is_over_soon_says_nothing() -> None:
    with Pipe() as pipe:
        row = pipe.row("reading")
        pipe.at(1)
        row.moved(10, 10)
        row.end()
        pipe.at(60)
    assert pipe.lines == []


def test_a_rate_forgets_what_was_there_and_falls_when_nothing_comes() -> None:
    with Pipe() as pipe:
        row = pipe.row("uploading", first=1000)
        for second, done in ((0, 0), (1, 900e6), (17, 932e6), (32, 962e6)):
            pipe.at(second)
            row.moved(done, 1e9)
        assert row.line() == "962.0 MB of 1.0 GB (96 %)  2.0 MB/s  ETA 19 s"
        pipe.at(38)
        assert row.line().endswith("  1.4 MB/s  ETA 27 s")
        pipe.at(92)
        assert row.line() == "962.0 MB of 1.0 GB (96 %)  unchanged for 1 min 00 s"


def test_a_total_that_is_not_known_and_a_unit_of_its_own() -> None:
    with Pipe() as pipe:
        row = pipe.row("before", first=1000)
        row.moved(5_000_000, 0)
        assert row.line() == "5.0 MB"
        row.doing("after", 1000)
        for second in range(7):
            pipe.at(second)
            row.moved(second, 12, "prompts")
        assert row.line() == "6 of 12 prompts (50 %)  ETA 6.0 s"
        # Another measure has a rate of its own.
        row.moved(20, 30, "answers")
        assert row.line() == "20 of 30 answers (67 %)"


def test_words_of_its_own_are_said_first_and_last_and_none_twice() -> None:
    with Pipe() as pipe:
        row = pipe.row("train", first=LINE_SECONDS)
        for second, step in ((3, 1), (4, 2), (8, 3), (14, 4), (25, 4), (40, 4), (41, 5), (42, 6)):
            pipe.now = 100.0 + second
            row.at(f"step {step}/6", step, 6, drawn="▁▂")
        row.end()
    assert pipe.lines == ["step 1/6", "step 4/6", "step 5/6", "step 6/6"]


def test_a_host_that_waits_for_others_says_nothing() -> None:
    with Pipe() as pipe:
        row = pipe.row("gpu1")
        row.rest("gpu1")
        pipe.at(60)
    assert pipe.lines == []


def test_time_passes_without_a_word_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a pipe speaks where the work itself is silent."""
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.05)
    out = io.StringIO()
    with Display(Console(file=out, width=80)) as display:
        display.row("loading", first=0.0)
        ends = time.monotonic() + 60
        while not out.getvalue() and time.monotonic() < ends:
            time.sleep(0.05)
    assert out.getvalue().startswith("loading: ")


def test_rows_on_a_terminal_are_texts_and_leave_the_lines() -> None:
    made, out = screen()
    with Display(made) as display:
        row = display.row("[red]up\x1b]0;title\x07")
        row.moved(1_000_000, 3_000_000)
        other = display.row("train")
        other.at("step 1/9  loss 2.0", 1, 9, drawn="▁▂")
        display.say("a line")
    shown = out.getvalue()
    assert re.search(r"\[red\]up.*━.*1\.0 MB of 3\.0 MB \(33 %\)", shown)
    assert re.search(r"train.*━.*▁▂ step 1/9  loss 2\.0", shown)
    assert "title" not in shown
    # What was said stays, the last words of a row among it: a line of its own.
    assert re.search(r"\x1b\[2Ka line\s*\n", shown)
    assert re.search(r"\x1b\[2Kstep 1/9  loss 2\.0\s*\n", shown)


def test_a_bar_of_a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = screen()
    monkeypatch.setattr(console, "console", made)
    with console.moving("rows encoded", formats.count) as moved:
        moved(0, 3000)
        moved(1500, 3000)
    assert re.search(r"rows encoded.*━.*1,500 of 3,000 \(50 %\)", out.getvalue())


def test_what_was_told_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0.05)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.telling() as tell:
        tell("installing cu128 (8.1 GB) ...")
        said = capsys.readouterr().out
        now[0] = 11.0
        ends = real() + 60
        while not said.endswith("11 s\n") and real() < ends:
            said += capsys.readouterr().out
        tell("checking; `inv stack.show` shows what")
    assert (said + capsys.readouterr().out).splitlines() == [
        "installing cu128 (8.1 GB) ...",
        "installing cu128 (8.1 GB): 11 s",
        "checking; `inv stack.show` shows what",
    ]


def test_a_fetch_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with base_model.fetching() as show:
        show(Progress("look", "m: asking https://hub"))
        for second in range(1, 30):
            now[0] = float(second)
            show(Progress("download", "m from https://hub", second * 10_000_000, 300_000_000))
        show(Progress("note", "m: damaged; fetching it again"))
    assert capsys.readouterr().out.splitlines() == [
        "  m: asking https://hub",
        "  m from https://hub: 30.0 MB of 300.0 MB (10 %)  10.0 MB/s  ETA 27 s",
        "  m from https://hub: 130.0 MB of 300.0 MB (43 %)  10.0 MB/s  ETA 17 s",
        "  m from https://hub: 230.0 MB of 300.0 MB (77 %)  10.0 MB/s  ETA 7.0 s",
        "  m: damaged; fetching it again",
    ]
