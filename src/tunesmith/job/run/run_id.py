"""The id of a run: the name of its folder, on every machine it is worked on or copied to.

Whatever names a run (an option, a host's answer, run.json, a folder's own name) becomes a RunId
before a path is made of it. Standard library only.
"""

from __future__ import annotations

import re

from tunesmith.core.errors import UsageError

LONGEST = 80  # characters; the rest of a file name is for suffixes of ours
_GRAMMAR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunId(str):
    """Text that names a run: 1 to 80 of A-Z a-z 0-9 . _ -, the first a letter or digit.

    Raises UsageError for anything else: a path, a hidden name, an option, an empty text.
    """

    __slots__ = ()

    def __new__(cls, text: object) -> RunId:
        """Return `text` as an id."""
        if not is_run_id(text):
            shown = repr(text) if len(repr(text)) <= 60 else f"{repr(text)[:60]}..."
            raise UsageError(
                f"run id {shown}: expected 1 to {LONGEST} of A-Z a-z 0-9 . _ -, the first a "
                "letter or digit",
                hint="`inv runs` lists the runs",
            )
        return super().__new__(cls, text)


def is_run_id(text: object) -> bool:
    """Return whether `text` can be a RunId."""
    return isinstance(text, str) and len(text) <= LONGEST and bool(_GRAMMAR.fullmatch(text))
