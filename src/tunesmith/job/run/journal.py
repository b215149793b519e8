"""What is told of a run, by its supervisor and its worker, whatever its disk does.

What cannot be written waits in memory, in order, and is written when the disk takes it again.
Only a disk's own refusals (full, read-only, failing: job/system/disk.py) are waited for.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tunesmith.core import formats
from tunesmith.core.files import write_text
from tunesmith.job.run import relay
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import Event, line_of
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunStatus
from tunesmith.job.system import disk

# Events that wait at most: hours of steps, a few megabytes. The oldest go first.
BOUND = 20_000
_STATUS_SECONDS = 1.0
_LAST = b'"event": "run_ended"'
_POLL_SECONDS = 0.2


class Journal:
    """The supervisor's: events in order, and the newest status."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._reserve = disk.Reserve(run.reserve_file)
        self._events: deque[bytes] = deque()
        self._status: str | None = None
        self._status_at = 0.0
        self._since: float | None = None
        self._lost = 0
        self.trouble: OSError | None = None

    def open(self) -> None:
        """Take the reserve. Raises OSError when the disk has no room for the run's records."""
        self._reserve.take()

    def close(self) -> None:
        """Give the reserve back. A status that was refused to the last is dropped: whoever works
        in the run after this has one of its own."""
        self._status = None
        self._reserve.drop()

    def emit(self, event: str, **fields: Any) -> None:
        """Tell an event."""
        self._queue(line_of(event, fields))
        self.flush()

    def adopt(self, event: Event) -> None:
        """Tell an event of a worker that could not write it, with the time it had."""
        self._queue((json.dumps(encode(event), ensure_ascii=False) + "\n").encode())

    def log(self, text: str) -> None:
        """Add a line to train.log, unless its disk refuses it: it says no more than the events."""
        try:
            disk.append(self._run.log_file, f"{text}\n".encode())
        except OSError as error:
            self._note(error)

    def status(self, status: RunStatus) -> None:
        """Tell where the run stands."""
        self._status = json.dumps(encode(status), ensure_ascii=False, indent=2) + "\n"
        self._status_at = 0.0
        self.flush()

    def flush(self) -> bool:
        """Write what waits, events before the status; return whether nothing waits any more."""
        try:
            self._flush_events()
            self._flush_status()
            if self._since is not None and self._status is None:
                self._tell_trouble()
        except OSError as error:
            self._note(error)
            return False
        return not self._events and self._status is None

    def last_words(self, seconds: float, stop: Callable[[], bool]) -> bool:
        """Write what waits, on a full disk into the reserve's room; return whether all was.

        A disk that takes nothing at all is waited for so many seconds, or until `stop`.
        """
        until = time.monotonic() + seconds
        while not self.flush():
            try:
                self._reserve.shrink()
                self._flush_events()
                self._give_up_reserve()
            except OSError as error:
                self._note(error)
            if time.monotonic() > until or stop():
                break
            time.sleep(_POLL_SECONDS)
        if self._events and self._status is not None:
            # The end counts more than the order.
            try:
                self._give_up_reserve()
            except OSError as error:
                self._note(error)
        return not self._events and self._status is None

    def _queue(self, line: bytes) -> None:
        if len(self._events) >= BOUND:
            self._events.popleft()
            self._lost += 1
        self._events.append(line)

    def _flush_events(self) -> None:
        while self._events:
            if self._since is not None and _LAST in self._events[0]:
                self._tell_trouble()  # nothing comes after the end
            disk.append(self._run.events_file, self._events[0])
            self._events.popleft()

    def _flush_status(self) -> None:
        if self._status is not None and time.monotonic() - self._status_at >= _STATUS_SECONDS:
            self._status_at = time.monotonic()
            write_text(self._run.status_file, self._status)
            self._status = None

    def _give_up_reserve(self) -> None:
        if self._status is not None and self._run.reserve_file.is_file():
            self._reserve.become(self._run.status_file, self._status)
            self._status = None

    def _note(self, error: OSError) -> None:
        if not disk.refused(error):
            raise error
        self.trouble = error
        if self._since is None:
            self._since = time.monotonic()

    def _tell_trouble(self) -> None:
        """Tell of the time without a disk, which is over if it takes this."""
        assert self.trouble is not None
        assert self._since is not None
        why = self.trouble.strerror or str(self.trouble)
        blocked = formats.duration(time.monotonic() - self._since)
        text = f"the run's disk took nothing for {blocked} ({why}); what happened meanwhile "
        text += f"was kept in memory, but for {self._lost} events" if self._lost else "was kept"
        disk.append(self._run.events_file, line_of("note", {"text": text}))
        self.trouble, self._since, self._lost = None, None, 0


class Reporter:
    """A worker's. Call it with an event.

    From the first event on that the disk refuses, all go by the supervisor, which keeps their
    order; without one they wait here.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._events: deque[bytes] = deque(maxlen=BOUND)
        self._handing_over = False

    def __call__(self, event: str, **fields: Any) -> None:
        """Tell an event."""
        self._events.append(line_of(event, fields))
        self.flush()

    def heartbeat(self, value: dict[str, Any]) -> None:
        """Tell the newest step: in a file, or to the supervisor where the disk refuses it."""
        self.flush()
        try:
            write_text(self._run.heartbeat_file, json.dumps(value, indent=2) + "\n")
        except OSError as error:
            if not disk.refused(error):
                raise
            relay.send([(json.dumps({"heartbeat": value}) + "\n").encode()])

    def flush(self) -> bool:
        """Bring what waits to the disk or the supervisor; return whether nothing waits."""
        if self._handing_over and self._hand_over():
            return True
        while self._events:
            try:
                disk.append(self._run.events_file, self._events[0])
            except OSError as error:
                if not disk.refused(error):
                    raise
                self._handing_over = True
                return self._hand_over()
            self._events.popleft()
        return True

    def _hand_over(self) -> bool:
        for _ in range(relay.send(list(self._events))):
            self._events.popleft()
        return not self._events


class SilentReporter(Reporter):
    """That of a rank besides the first: what all have to tell, the first one tells."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Tell nothing."""

    def heartbeat(self, value: dict[str, Any]) -> None:
        """Tell nothing."""
