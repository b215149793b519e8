"""Progress callbacks of long operations. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

# One line of text for the user.
OnText = Callable[[str], None]
# Bytes done, and bytes in total (0: unknown).
OnBytes = Callable[[int, int], None]
