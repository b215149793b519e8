"""The one console that the verbs print to, and how a line is said."""

from __future__ import annotations

import sys

from rich.console import Console

# In a pipe nothing knows the width: wide enough that a table's cells stay whole.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """Print a line as it is: no markup, no colour, no folding."""
    console.print(text, markup=False, soft_wrap=True)
