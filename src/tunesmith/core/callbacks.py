"""What long work calls on its way, so that somebody may show it. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

# One line for a person.
OnText = Callable[[str], None]
# Bytes done, and bytes in all (0: not known).
OnBytes = Callable[[int, int], None]
