"""What long work calls on its way, so that somebody may show it. Standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# One line for a person.
OnText = Callable[[str], None]
# Bytes done, and bytes in all (0: not known).
OnBytes = Callable[[int, int], None]
# Shows a piece of work, under a word for it, while it lasts; what `OnBytes` hears is how far it is.
Bar = Callable[[str], contextlib.AbstractContextManager[OnBytes]]


@contextlib.contextmanager
def unseen(_what: str) -> Iterator[OnBytes]:
    """Show nothing."""
    yield lambda _done, _total: None
