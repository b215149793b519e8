"""A run as a stream of changes: what a client on another machine follows.

A line whose status is final is the last one: until everything of an ended run was told, it
is shown as running. Standard library only. A poll costs three stat() calls; files are read
when they have changed.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.job.run.events import EventTail
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.replies import RunSnapshot
from tunesmith.job.run.schema import RunStatus

# Bytes of events, and of log, in one line of the stream.
PIECE = 256 * 1024
_LOOK_SECONDS = 0.2
# Whether the supervisor still lives is asked of the lock, which changes no file.
_ALIVE_SECONDS = 1.0
_SIGN_OF_LIFE_SECONDS = 3.0

_Stamp = tuple[int, int, int]


def poll(run: RunFolder, events_offset: int, log_offset: int) -> RunSnapshot:
    """Return what is new behind two byte offsets; a log offset of -1 leaves the log out."""
    # The status first: an end that it tells must not outrun the events and the log.
    status = run.status()
    if not run.path.is_dir():
        raise UsageError(f"run {run.run_id} was removed")
    tail = EventTail(run.events_file, events_offset)
    events = tail.new(PIECE)
    more = tail.cut and _size(run.events_file) > tail.offset
    text, offset = "", log_offset
    if log_offset >= 0:
        text, offset = read_log(run.log_file, log_offset, not status.active)
        # A piece may end some bytes early, before a character that it would have cut.
        more |= offset - log_offset > PIECE - 4 and _size(run.log_file) > offset
    return RunSnapshot(status, tuple(events), tail.offset, text, offset, more)


def watch(run: RunFolder, events_offset: int, log_offset: int) -> Iterator[RunSnapshot]:
    """Yield a line whenever something changed, and every 3 s; end with the run."""
    while True:
        seen, told = _signature(run), time.monotonic()
        line = poll(run, events_offset, log_offset)
        events_offset, log_offset = line.events_offset, line.log_offset
        if line.more and not line.status.active:
            yield replace(line, status=replace(line.status, state="running"))
            continue
        yield line
        if not line.status.active:
            return
        if not line.more:
            _await_change(run, seen, line.status, told)


def _await_change(
    run: RunFolder, seen: list[_Stamp | None], status: RunStatus, told: float
) -> None:
    """Return when a file has another stamp, the supervisor died, or a sign of life is due."""
    asked = told
    while True:
        time.sleep(_LOOK_SECONDS)
        now = time.monotonic()
        if now - told >= _SIGN_OF_LIFE_SECONDS or _signature(run) != seen:
            return
        if now - asked >= _ALIVE_SECONDS:
            asked = now
            if run.status() != status:
                return


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


def _signature(run: RunFolder) -> list[_Stamp | None]:
    found: list[_Stamp | None] = []
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
