"""The one console that the verbs print to, and how a line is said.

Whatever reaches it, as a line, in a table or beside a bar, loses what a terminal would obey
(tunesmith.core.printable), and is never read as rich's markup.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from tunesmith.cli.command import as_typed
from tunesmith.core import formats
from tunesmith.core.callbacks import OnBytes, OnText
from tunesmith.core.printable import printable
from tunesmith.core.progress import LINE_SECONDS, Display, Row


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
    """Show a piece of work while it lasts; yield moved(done, total), for work that knows both.

    They are bytes, unless `shown` writes another kind of number.
    """
    with Display(console) as display:
        yield display.row(what, shown).moved


@contextlib.contextmanager
def telling() -> Iterator[OnText]:
    """Yield tell(text), which says a line and shows how long what it tells of goes on."""
    with Display(console) as display:
        row: Row | None = None

        def tell(text: str) -> None:
            nonlocal row
            display.say(as_typed(text))
            row = row or display.row("")
            row.doing(text.removesuffix(" ..."), LINE_SECONDS)

        yield tell
