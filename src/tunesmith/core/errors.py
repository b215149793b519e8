"""Errors meant for people: one line first, detail below.

Used by both halves, so this module imports nothing outside the standard library
and runs on Python 3.10. What a message quotes of a host, a file or a model cannot command
the terminal it is printed on.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.printable import printable


class TunesmithError(Exception):
    """The work failed. Exit code 1.

    `message` is the one line a person reads first: it names the file, row, key or host and the
    value found. `detail` lines follow it. `hint` names a command or action that works when followed
    literally.
    """

    exit_code = 1

    def __init__(self, message: str, detail: Sequence[str] = (), *, hint: str = "") -> None:
        super().__init__(message)
        self.message = printable(message)
        self.detail = tuple(map(printable, detail))
        self.hint = printable(hint)

    @property
    def line(self) -> str:
        """Message and hint as one line, for a log or a table, and where only one text travels."""
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def render(self) -> str:
        """Return `error: MESSAGE`, the detail lines indented below it, and `hint: HINT`."""
        lines = [f"error: {self.message}", *(f"  {line}" for line in self.detail)]
        return "\n".join([*lines, f"hint: {self.hint}"] if self.hint else lines)


class UsageError(TunesmithError):
    """The input is wrong and nothing was started or written. Exit code 2."""

    exit_code = 2


def printed_error(text: str, exit_code: int, otherwise: str) -> TunesmithError:
    """Return the error that another process of ours printed before it ended with `exit_code`.

    `text` is what `render` made, perhaps with other lines before it; `otherwise` is the message
    where there is no text at all.
    """
    lines = text.strip().splitlines() or [otherwise]
    began = next((n for n, line in enumerate(lines) if line.startswith("error: ")), 0)
    first, *detail = lines[began:]
    hint = detail.pop().removeprefix("hint: ") if detail and detail[-1].startswith("hint: ") else ""
    kind = UsageError if exit_code == UsageError.exit_code else TunesmithError
    return kind(first.removeprefix("error: "), [line.strip() for line in detail], hint=hint)
