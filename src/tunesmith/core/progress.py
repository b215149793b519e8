"""The one way that work in progress is shown: a row with a bar on a terminal, lines in a pipe.

What is fetched, uploaded, pulled, read and built, hosts that are provisioned and runs that are
followed all have a `Row` of a `Display`. In a pipe a row speaks FIRST_SECONDS after it began, if
it still works then, and every LINE_SECONDS after that. On a terminal all rows are drawn live and
leave nothing behind: what is to stay is said as a line (`Display.say`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tunesmith.core import formats
from tunesmith.core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

# With a look now and then: a first sign within two seconds.
FIRST_SECONDS = 1.5
LINE_SECONDS = 10.0
_LOOK_SECONDS = 0.25
_BAR_WIDTH = 30
# A rate is that of so many seconds: what is only compared after a cut soon counts no more.
_RATE_SECONDS = 15.0
_SAMPLE_SECONDS = 0.25
_SETTLED_SECONDS = 2.0
_SILENT_SECONDS = 5.0


class _Rate:
    """How fast a measure grows, over the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()

    def take(self, done: float, now: float) -> None:
        samples = self._samples
        if len(samples) > 1 and now - samples[-2][0] < _SAMPLE_SECONDS:
            samples.pop()
        samples.append((now, done))
        while len(samples) > 2 and samples[1][0] <= now - _RATE_SECONDS:
            samples.popleft()

    def per_second(self, now: float) -> float | None:
        """Return the rate; None in the first moments, which say nothing of it."""
        if not self._samples or now - self._samples[0][0] < _SETTLED_SECONDS:
            return None
        (began, first), (last, done) = self._samples[0], self._samples[-1]
        # Between two words of the work nothing has slowed down; after a while without one it has.
        until = now if now - last > _SILENT_SECONDS else last
        return max(done - first, 0.0) / (until - began) if until > began else None


class Row:
    """One piece of work: what it does, and how far it is.

    Made by `Display.row`. A row that says no measure and no words of its own shows how long what
    it does has been going on.
    """

    def __init__(
        self, display: Display, label: str, shown: Callable[[float], str], first: float, ago: float
    ) -> None:
        self._display = display
        self._shown = shown
        self.resting = False
        self._begin(label, first)
        self._began -= ago

    def _begin(self, label: str, first: float) -> None:
        now = self._display.clock()
        self.label = printable(label)
        self.done, self.total = 0.0, 0.0
        self._measured, self._unit, self._words, self._drawn = False, "", "", ""
        self._said = ""
        self._rate = _Rate()
        self._began, self._due, self._moved_at = now, now + first, now

    def doing(self, label: str, first: float = FIRST_SECONDS) -> None:
        """Begin something else; in a pipe it is told of after `first` seconds."""
        self.resting = False
        self._begin(label, first)
        self._display.look()

    def rest(self, label: str) -> None:
        """Do nothing for now, which is not told."""
        self._begin(label, LINE_SECONDS)
        self.resting = True

    def moved(self, done: float, total: float, unit: str = "") -> None:
        """Be `done` of `total` (0: not known): bytes, or what the row shows, or counts of `unit`.

        With a unit the rate is left out: a quarter of a prompt a second says nothing.
        """
        now = self._display.clock()
        if unit != self._unit or done < self.done:
            # Another measure: what was before says nothing of how fast this one grows.
            self._rate = _Rate()
        if (done, unit, total) != (self.done, self._unit, self.total):
            self._moved_at = now
        self._measured, self._unit = True, printable(unit)
        self.done, self.total = done, total
        self._rate.take(done, now)
        self._display.look()

    def at(self, words: str, done: float, total: float, drawn: str = "") -> None:
        """Be `done` of `total`, in words of the caller's that stand alone in a pipe.

        `drawn` goes before them on a terminal. The first words are said at once, the last when
        the row ends, none twice.
        """
        if not self._words:
            self._due = self._display.clock()
        self._words, self._drawn = printable(words), printable(drawn)
        self.done, self.total = done, total
        self._display.look()

    def line(self) -> str:
        """Return how far it is, without the label."""
        now = self._display.clock()
        if self._words:
            return " ".join(filter(None, (self._drawn, self._words)))
        if self._measured:
            return "  ".join(self._measure(now))
        return "" if self.resting else formats.duration(now - self._began)

    def _measure(self, now: float) -> Iterator[str]:
        if self._unit:
            yield formats.share(self.done, self.total, formats.count, self._unit)
        else:
            yield formats.share(self.done, self.total, self._shown)
        if (still := now - self._moved_at) >= LINE_SECONDS:
            yield f"unchanged for {formats.duration(still)}"
            return
        speed = self._rate.per_second(now)
        if speed and not self._unit:
            yield f"{self._shown(speed)}/s"
        if speed and self.done < self.total:
            yield f"ETA {formats.duration((self.total - self.done) / speed)}"

    def due_line(self, now: float) -> str | None:
        """Return what a pipe is told now, or None."""
        if now < self._due or self.resting or (self._words and self._words == self._said):
            return None
        self._due = now + LINE_SECONDS
        self._said = self._words
        return self._words or f"{self.label}: {self.line()}"

    def end(self) -> None:
        """Take the row away; words of its own that nobody was told yet are said."""
        self._display.remove(self)
        if self._words and self._words != self._said:
            self._said = self._words
            self._display.say(self._words)


class Display:
    """Rows of work on a console, while it is entered: live on a terminal, lines in a pipe.

    One at a time on a terminal, as only one can be live.
    """

    def __init__(self, console: Console, clock: Callable[[], float] | None = None) -> None:
        self._console = console
        # Looked up at each call: what stands in for it in a test does so at once.
        self.clock: Callable[[], float] = clock or (lambda: time.monotonic())
        self._rows: list[Row] = []
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._live = _Live(console) if console.is_terminal else None
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        else:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.refresh()
        for row in list(self._rows):
            row.end()
        if self._live:
            self._live.stop()
        else:
            self._over.set()
            self._ticker.join()

    def row(
        self,
        label: str,
        shown: Callable[[float], str] = formats.size,
        first: float = FIRST_SECONDS,
        ago: float = 0.0,
    ) -> Row:
        """Return a new row, whose measure is written by `shown`.

        In a pipe it is told of after `first` seconds. The work began so many seconds `ago`.
        """
        row = Row(self, label, shown, first, ago)
        with self._lock:
            self._rows.append(row)
            if self._live:
                self._live.add(row)
        return row

    def remove(self, row: Row) -> None:
        """Show a row no more."""
        with self._lock:
            if row in self._rows:
                self._rows.remove(row)
                if self._live:
                    self._live.remove(row)

    def say(self, text: str) -> None:
        """Print a line that stays, above what is live."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def look(self) -> None:
        """In a pipe, say what is due; a terminal is drawn anew all the time."""
        if self._live:
            return
        with self._lock:
            now = self.clock()
            for row in self._rows:
                if (line := row.due_line(now)) is not None:
                    self.say(line)

    def _tick(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self.look()


class _Live:
    """Rows as rich draws them on a terminal, several times a second."""

    def __init__(self, console: Console) -> None:
        # Here: a pipe needs none of it.
        from rich.progress import BarColumn, Progress, ProgressColumn, Task
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        class Words(ProgressColumn):
            """One text of a row, which is never read as markup."""

            def __init__(self, text: Callable[[Row], str]) -> None:
                super().__init__()
                self._text = text

            def render(self, task: Task) -> Text:
                return Text(self._text(task.fields["row"]), overflow="ellipsis", no_wrap=True)

        class Bar(BarColumn):
            """How far a row is; one that cannot say moves to and fro."""

            def render(self, task: Task) -> ProgressBar:
                row: Row = task.fields["row"]
                task.completed, task.total = row.done, row.total or None
                return super().render(task)

        columns = (Words(lambda row: row.label), Bar(_BAR_WIDTH), Words(Row.line))
        self._progress = Progress(*columns, console=console, transient=True)
        self._tasks: dict[int, TaskID] = {}
        self.start = self._progress.start
        self.refresh = self._progress.refresh
        self.stop = self._progress.stop

    def add(self, row: Row) -> None:
        """Draw a row below the others."""
        self._tasks[id(row)] = self._progress.add_task("", total=None, row=row)

    def remove(self, row: Row) -> None:
        """Draw it no more."""
        self._progress.remove_task(self._tasks.pop(id(row)))
