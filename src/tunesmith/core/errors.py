"""Errors for people: one line first, details below.

Used by both halves, so this module imports only the standard library and runs on Python 3.10.
Quoted text of a host, a file or a model contains no control characters for the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.printable import printable


class TunesmithError(Exception):
    """The work failed. Exit code 1.

    `message` is the line a person reads first: it names the file, row, key or host and the value
    found. `detail` lines follow it. `hint` is a command or action that works when followed
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
        """Message and hint as one line, for logs, tables and other places with only one text."""
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def render(self) -> str:
        """Return `error: MESSAGE`, the detail lines indented below it, and `hint: HINT`."""
        lines = [f"error: {self.message}", *(f"  {line}" for line in self.detail)]
        return "\n".join([*lines, f"hint: {self.hint}"] if self.hint else lines)


class UsageError(TunesmithError):
    """The input is wrong and nothing was started or written. Exit code 2."""

    exit_code = 2


def printed_error(text: str, exit_code: int, otherwise: str) -> TunesmithError:
    """Return the error that another of our processes printed before it exited with `exit_code`.

    `text` is the output of `render`, possibly after other lines; `otherwise` is the message if
    there is no text at all.
    """
    lines = text.strip().splitlines() or [otherwise]
    began = next((n for n, line in enumerate(lines) if line.startswith("error: ")), 0)
    first, *detail = lines[began:]
    hint = detail.pop().removeprefix("hint: ") if detail and detail[-1].startswith("hint: ") else ""
    kind = UsageError if exit_code == UsageError.exit_code else TunesmithError
    return kind(first.removeprefix("error: "), [line.strip() for line in detail], hint=hint)
