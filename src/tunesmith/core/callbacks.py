"""Progress callbacks of long operations. Standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# One line of text for the user.
OnText = Callable[[str], None]
# Bytes done, and bytes in total (0: unknown).
OnBytes = Callable[[int, int], None]
# Shows a piece of work, under a word for it, while it lasts; what `OnBytes` hears is how far it is.
Bar = Callable[[str], contextlib.AbstractContextManager[OnBytes]]


@contextlib.contextmanager
def unseen(_what: str) -> Iterator[OnBytes]:
    """Show nothing."""
    yield lambda _done, _total: None
