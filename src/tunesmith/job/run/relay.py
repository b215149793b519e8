"""From a worker to its supervisor past the disk: what could not be written is handed over.

A pipe of the supervisor's, opened by its place in /proc: so it reaches the ranks of torchrun
too, which inherit no descriptor. Only processes of the same user may open it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Sequence

from tunesmith.core.documents import JsonObject

# In a worker's environment: where the pipe is, and its inode, so that a later process with the
# supervisor's pid is not taken for it.
RELAY = "TUNESMITH_RELAY"
_PIPE_BYTES = 1 << 20
_SEND_SECONDS = 5.0


class Receiver:
    """The supervisor's end. Lives as long as its process."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # a limit of the machine's: 64 kB do as well
            fcntl.fcntl(self._writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        inode = os.fstat(self._writing).st_ino
        self.address = f"/proc/{os.getpid()}/fd/{self._writing} {inode}"
        self._content = b""

    def received(self) -> list[JsonObject]:
        """Return what was sent since the last call, in order; what is no object is left out."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._reading, _PIPE_BYTES):
                self._content += piece
        *lines, self._content = self._content.split(b"\n")
        return [value for line in lines if (value := _parse(line)) is not None]


def send(lines: Sequence[bytes]) -> int:
    """Hand whole lines to the supervisor; return how many it took: none where there is none."""
    place, _, inode = os.environ.get(RELAY, "").partition(" ")
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        if str(os.fstat(descriptor).st_ino) != inode:
            return 0
        return _send(descriptor, lines)
    finally:
        os.close(descriptor)


def _send(descriptor: int, lines: Sequence[bytes]) -> int:
    deadline = time.monotonic() + _SEND_SECONDS
    for done, line in enumerate(lines):
        left = line
        while left:
            try:
                left = left[os.write(descriptor, left) :]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return done
                time.sleep(0.05)
            except OSError:
                return done
    return len(lines)


def _parse(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None  # a torn line: its writer was killed
    return value if isinstance(value, dict) else None
