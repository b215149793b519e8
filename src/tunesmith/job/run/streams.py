"""Output that survives a disk that takes nothing: a line of a log ends no training."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from tunesmith.job.system import disk


class _Patient(io.RawIOBase):
    """A descriptor. What its disk refuses is counted, and told when it takes something again."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lost = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write some of `data`; return how much was dealt with."""
        try:
            if self._lost:
                os.write(self._descriptor, f"\n[{self._lost} bytes are missing]\n".encode())
                self._lost = 0
            return os.write(self._descriptor, data)
        except OSError as error:
            if not disk.refused(error):
                raise
            self._lost += len(data)
            return len(data)


def outlive_disk() -> None:
    """Let this process's stdout and stderr lose what their disk refuses, and go on."""
    sys.stdout = _patient(sys.stdout)
    sys.stderr = _patient(sys.stderr)


def _patient(stream: TextIO) -> TextIO:
    stream.flush()
    # Lines at once, as from an unbuffered Python.
    return io.TextIOWrapper(
        io.BufferedWriter(_Patient(stream.fileno())),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors or "backslashreplace",
        line_buffering=True,
        write_through=True,
    )
