"""The one console that the verbs print to, and how a line is said."""

from __future__ import annotations

import os
import re
import sys

from rich.console import Console

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
