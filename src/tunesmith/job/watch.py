"""A run as a stream of changes: what a client on another machine follows.

Standard library only. One look costs three stat() calls; files are read when they changed.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.job.rundir import EventTail, RunFolder

# Bytes of events, and of log, in one line of the stream.
PIECE = 256 * 1024
_LOOK_SECONDS = 0.2
# Whether the supervisor still lives is asked of the lock, which changes no file.
_ALIVE_SECONDS = 1.0
_SIGN_OF_LIFE_SECONDS = 3.0


@dataclass(frozen=True)
class Line:
    """One line of the stream: status, what is new, and where the next look continues.

    `more`: the next piece is there already; the last line of an ended run has not got it.
    """

    status: dict[str, Any]
    events: list[dict[str, Any]]
    events_offset: int
    log: str
    log_offset: int
    more: bool

    @property
    def last(self) -> bool:
        """Whether the run has ended and everything of it was told."""
        return self.status["state"] not in ("running", "queued") and not self.more

    def to_json(self) -> dict[str, Any]:
        """Return the line as it is sent; `more` only when it is true."""
        value = {
            "status": self.status,
            "events": self.events,
            "events_offset": self.events_offset,
            "log": self.log,
            "log_offset": self.log_offset,
        }
        return value | {"more": True} if self.more else value


def look(run: RunFolder, events_offset: int, log_offset: int) -> Line:
    """Return what is new behind two byte offsets; a log offset of -1 leaves the log out."""
    # The status first: an end that it tells must not outrun the events and the log.
    status = run.status()
    tail = EventTail(run.events_file, events_offset)
    events = tail.new(PIECE)
    ended = status["state"] not in ("running", "queued")
    text, log_offset = ("", -1) if log_offset < 0 else read_log(run.log_file, log_offset, ended)
    more = bool(events) and _size(run.events_file) > tail.offset
    more = more or (bool(text) and _size(run.log_file) > log_offset)
    return Line(status, events, tail.offset, text, log_offset, more)


def watch(run: RunFolder, events_offset: int, log_offset: int) -> Iterator[Line]:
    """Yield a line whenever something changed, and every 3 s; end with the run."""
    line = look(run, events_offset, log_offset)
    seen, told, asked = _signature(run), time.monotonic(), time.monotonic()
    yield line
    while not line.last:
        if not line.more:
            time.sleep(_LOOK_SECONDS)
            now, signature = time.monotonic(), _signature(run)
            due = now - told >= _SIGN_OF_LIFE_SECONDS
            if signature == seen and not due:
                if now - asked < _ALIVE_SECONDS:
                    continue
                asked = now
                if run.status() == line.status:
                    continue
            seen = signature
        line = look(run, line.events_offset, line.log_offset)
        told = asked = time.monotonic()
        yield line


def read_log(path: Path, offset: int, whole: bool) -> tuple[str, int]:
    """Return up to PIECE bytes from `offset` as text, and the offset behind them.

    A character of which only the first bytes were written yet is left for the next time,
    unless the file is `whole` and nothing can follow it.
    """
    try:
        with path.open("rb") as log:
            log.seek(offset)
            content = log.read(PIECE)
    except FileNotFoundError:
        return "", offset
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(content)
    pending = len(decoder.getstate()[0])
    if whole and pending and len(content) < PIECE:
        return text + decoder.decode(b"", final=True), offset + len(content)
    return text, offset + len(content) - pending


def _signature(run: RunFolder) -> list[tuple[int, int, int] | None]:
    found: list[tuple[int, int, int] | None] = []
    for file in (run.status_file, run.events_file, run.log_file):
        try:
            stat = file.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
