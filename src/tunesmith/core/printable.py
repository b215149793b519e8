"""Foreign text as a terminal may show it: data rows, what hosts and models say, file names.

A terminal obeys what it prints: an escape sequence sets its title, writes the clipboard
(OSC 52), moves the cursor over lines of ours; characters that turn the direction of writing
show a command other than the one that is copied. Both halves use this, so it runs on Python
3.10 with the standard library alone.
"""

from __future__ import annotations

import re

# Whole sequences first, so that their letters go with them: OSC, DCS, SOS, PM and APC up to
# their end, CSI, and the short ones. One that does not end loses its first character below.
SEQUENCES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|\x1b[ -/]{0,8}[0-Z\\^-~]"
)
# C0 but for tab and line feed, DEL, C1; marks, embeddings, overrides and isolates of the
# writing direction; separators that some programs take for a new line; lone surrogates, which
# no stream can encode.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)
_ENDS = re.compile(r"\r\n?")


def printable(text: str) -> str:
    """Return `text` without what a terminal would obey; tabs and line feeds stay.

    A carriage return, with which a progress bar writes over its line, begins a new one.
    """
    if text.isascii() and text.isprintable():
        return text
    return CONTROLS.sub("", SEQUENCES.sub("", _ENDS.sub("\n", text)))


def one_line(text: str, longest: int = 200) -> str:
    """Return `text` printable, on one line, cut to `longest` characters."""
    # Cut first: what is far too long need not be looked at to its end.
    line = " ".join(printable(text[: 8 * longest]).split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def quoted(value: object, longest: int = 80) -> str:
    """Return a value as a message shows it: in quotes, escaped, on one line, not too long."""
    if isinstance(value, str | bytes):
        return one_line(repr(value[: 2 * longest]), longest)
    # What nests may nest too deep to be written out.
    return repr(value) if isinstance(value, bool | int | float | None) else type(value).__name__
