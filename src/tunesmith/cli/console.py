"""The one console that the verbs print to, and how a line is said.

Whatever reaches it, as a line, in a table or beside a bar, loses what a terminal would obey
(tunesmith.core.printable), and is never read as rich's markup.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, Task, TextColumn
from rich.segment import Segment
from rich.text import Text

from tunesmith.cli.command import as_typed
from tunesmith.core import formats
from tunesmith.core.callbacks import OnBytes
from tunesmith.core.printable import printable

# In a pipe: the time between two lines about what is moved.
_LINE_SECONDS = 10.0
# A rate is that of so many seconds: what is only compared after a cut soon counts no more.
_RATE_SECONDS = 15.0
_SETTLED_SECONDS = 2.0


class PlainConsole(Console):
    """A console whose texts are texts: its colours and bars are rich's own, nothing else is."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text to be drawn, cleaned before rich drops the end of a sequence alone."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield what is drawn, foreign control characters taken out."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=printable(segment.text))


# In a pipe nothing knows the width: wide enough that a table's cells stay whole.
console = PlainConsole(
    highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160
)


def say(text: str) -> None:
    """Print a line as it is: no markup, no colour, no folding."""
    console.print(printable(as_typed(text)), markup=False, soft_wrap=True)


def write(text: str) -> None:
    """Write a piece of foreign text, a log's, as it is but for what a terminal would obey."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


@contextlib.contextmanager
def moving(what: str, shown: Callable[[float], str] = formats.size) -> Iterator[OnBytes]:
    """Yield moved(done, total): a bar on a terminal, in a pipe a line now and then.

    Both are bytes, unless `shown` writes another kind of number.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30))
    progress = Progress(
        *columns,
        TextColumn("{task.fields[line]}", markup=False),
        console=console,
        transient=True,
        speed_estimate_period=_RATE_SECONDS,
        get_time=time.monotonic,
        # It still counts and measures.
        disable=not console.is_terminal,
    )
    task = progress.add_task(what, total=None, line="")
    said_at = time.monotonic()

    def moved(done: int, total: int) -> None:
        nonlocal said_at
        progress.update(task, completed=done, total=total)
        line = moved_line(progress.tasks[0], shown)
        progress.update(task, line=line)
        if progress.disable and time.monotonic() - said_at >= _LINE_SECONDS:
            said_at = time.monotonic()
            say(f"{what}: {line}")

    with progress:
        yield moved


def moved_line(task: Task, shown: Callable[[float], str] = formats.size) -> str:
    """Return what is done of all, the rate, and the time left, as far as they are known."""
    total = task.total or 0
    share = f" ({100 * task.completed / total:.0f} %)" if total else ""
    parts = [f"{shown(task.completed)} of {shown(total)}{share}"]
    # The first moments say nothing of the rate.
    speed = task.speed if (task.elapsed or 0.0) >= _SETTLED_SECONDS else None
    if speed:
        parts.append(f"{shown(speed)}/s")
    if speed and task.completed < total:
        parts.append(f"ETA {formats.duration((total - task.completed) / speed)}")
    return "  ".join(parts)
