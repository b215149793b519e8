"""A command on a host in the user's terminal, with a filter between the two.

What the host prints goes through here, so that it cannot set the clipboard or the title, clear
the screen or ask the terminal questions whose answers are typed. What line editing over there
needs (moving within the lines, erasing, inserting) passes.
"""

from __future__ import annotations

import codecs
import os
import re
import selectors
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from tunesmith.core.printable import CONTROLS, SEQUENCES

# Of a sequence that has begun at the end of a piece: it goes on in the next one.
_BEGUN = re.compile(
    r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}|[\]PX^_][^\x07\x1b\x9c\n]{0,4096}\x1b?|[ -/]{0,8})?\Z"
)
# Cursor up, right, left and to a column; erase, delete, insert: what readline says.
_EDITING = re.compile(r"\x1b\[[0-9]{0,4}[ACDGK@P]|[\r\b\a]")
_TOKENS = re.compile(f"{SEQUENCES.pattern}|{CONTROLS.pattern}")


class Screen:
    """Text on its way to a terminal, piece by piece."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = ""

    def feed(self, piece: bytes, *, last: bool = False) -> str:
        """Return what of the bytes may be shown; with `last` what was held back, too."""
        text = self._begun + self._decoder.decode(piece, last)
        begun = None if last else _BEGUN.search(text)
        self._begun = begun[0] if begun else ""
        text = text[: len(text) - len(self._begun)]
        return _TOKENS.sub(lambda found: found[0] if _EDITING.fullmatch(found[0]) else "", text)


def run(argv: Sequence[str]) -> int:
    """Run a command with this terminal's input; return its exit code."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            _copy({process.stdout: sys.stdout, process.stderr: sys.stderr})
        except BaseException:
            process.kill()  # Ctrl-C, above all
            raise
    return process.returncode


def _copy(ways: dict[IO[bytes], IO[str]]) -> None:
    """Show what comes out of each until all have ended."""
    screens = {source: Screen() for source in ways}
    with selectors.DefaultSelector() as selector:
        for source in ways:
            selector.register(source, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                source = next(source for source in ways if source is key.fileobj)
                piece = os.read(source.fileno(), 1 << 16)
                ways[source].write(screens[source].feed(piece, last=not piece))
                ways[source].flush()
                if not piece:
                    selector.unregister(source)
