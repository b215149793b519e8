"""The one console that the verbs print to, and how a line is said."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn

from tunesmith.files import human_bytes
from tunesmith.follow import duration

# In a pipe: the time between two lines about what is moved.
_LINE_SECONDS = 10.0
# A rate is that of so many seconds: what is only compared after a cut soon counts no more.
_RATE_SECONDS = 15.0
_SETTLED_SECONDS = 2.0

# In a pipe nothing knows the width: wide enough that a table's cells stay whole.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


# What the image's entry point says commands begin with there.
COMMAND = "TUNESMITH_COMMAND"
_INV = re.compile(r"`inv (?=[a-z])")


def as_typed(text: str) -> str:
    """Return a message with its commands as they are typed where this runs."""
    command = os.environ.get(COMMAND, "inv")
    return _INV.sub(f"`{command} ", text)


def say(text: str) -> None:
    """Print a line as it is: no markup, no colour, no folding."""
    console.print(as_typed(text), markup=False, soft_wrap=True)


@contextlib.contextmanager
def moving(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield moved(done, total), of bytes: a bar on a terminal, in a pipe a line now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30))
    progress = Progress(
        *columns,
        TextColumn("{task.fields[line]}"),
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
        line = moved_line(progress.tasks[0])
        progress.update(task, line=line)
        if progress.disable and time.monotonic() - said_at >= _LINE_SECONDS:
            said_at = time.monotonic()
            say(f"{what}: {line}")

    with progress:
        yield moved


def moved_line(task: Task) -> str:
    """Return the bytes done of all, the rate, and the time left, as far as they are known."""
    total = task.total or 0
    share = f" ({100 * task.completed / total:.0f} %)" if total else ""
    parts = [f"{human_bytes(task.completed)} of {human_bytes(total)}{share}"]
    # The first moments say nothing of the rate.
    speed = task.speed if (task.elapsed or 0.0) >= _SETTLED_SECONDS else None
    if speed:
        parts.append(f"{human_bytes(speed)}/s")
    if speed and task.completed < total:
        parts.append(f"ETA {duration((total - task.completed) / speed)}")
    return "  ".join(parts)
