"""Untrusted text made safe for a terminal: data rows, answers of hosts and models, file names.

A terminal executes escape sequences: they set its title, write the clipboard (OSC 52), move the
cursor over our lines; bidirectional characters display a different command than the one that is
copied. Used by both halves: Python 3.10, standard library only.
"""

from __future__ import annotations

import re

# Complete sequences first, so that their letters are removed too: OSC, DCS, SOS, PM and APC up to
# their terminator, CSI, and the short ones. An unterminated one loses its first character below.
SEQUENCES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|\x1b[ -/]{0,8}[0-Z\\^-~]"
)
# C0 except tab and line feed, DEL, C1; bidirectional marks, embeddings, overrides and isolates;
# separators that some programs treat as a new line; lone surrogates, which no stream can encode.
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)
_ENDS = re.compile(r"\r\n?")


def printable(text: str) -> str:
    """Return `text` without terminal control sequences; tabs and line feeds stay.

    A carriage return, which a progress bar uses to overwrite its line, starts a new line.
    """
    if text.isascii() and text.isprintable():
        return text
    return CONTROLS.sub("", SEQUENCES.sub("", _ENDS.sub("\n", text)))


def one_line(text: str, longest: int = 200) -> str:
    """Return `text` printable, on one line, truncated to `longest` characters."""
    # Truncate first, so that a very long text is not scanned to its end.
    line = " ".join(printable(text[: 8 * longest]).split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def quoted(value: object, longest: int = 80) -> str:
    """Return a value for a message: quoted, escaped, on one line, truncated."""
    if isinstance(value, str | bytes):
        return one_line(repr(value[: 2 * longest]), longest)
    # A container may be nested too deeply for repr.
    return repr(value) if isinstance(value, bool | int | float | None) else type(value).__name__
