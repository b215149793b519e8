"""A worker's messages to its supervisor: from the run's files, or a pipe if the disk refuses."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from tunesmith.job.run.codec import Fault, decode
from tunesmith.job.run.events import Event, EventTail
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.journal import Journal
from tunesmith.job.run.relay import Receiver
from tunesmith.job.run.schema import Heartbeat
from tunesmith.job.system import disk


@dataclass(frozen=True)
class News:
    """New events, in order, and heartbeats that were not written to their file."""

    events: list[Event]
    heartbeats: list[Heartbeat]


class Intake:
    """Reads events from the current end on. Events from the pipe are added to the journal."""

    def __init__(self, run: RunFolder, journal: Journal) -> None:
        self._journal = journal
        self._receiver = Receiver()
        size = run.events_file.stat().st_size if run.events_file.exists() else 0
        self._tail = EventTail(run.events_file, size)
        # Already returned: not new again when the journal has written them.
        self._handed: set[tuple[float, type[Event]]] = set()

    @property
    def address(self) -> str:
        """The value of relay.RELAY in a worker's environment."""
        return self._receiver.address

    def new(self) -> News:
        """Return the messages since the last call."""
        events, heartbeats = [], []
        for message in self._receiver.received():
            # The user's own code may write anything into the pipe.
            with contextlib.suppress(Fault):
                if "event" in message:
                    event = decode(Event, message)
                    self._handed.add(_key(event))
                    self._journal.adopt(event)
                    events.append(event)
                elif "heartbeat" in message:
                    heartbeats.append(decode(Heartbeat, message["heartbeat"]))
        for event in self._written():
            if _key(event) in self._handed:
                self._handed.discard(_key(event))
            else:
                events.append(event)
        return News(events, heartbeats)

    def _written(self) -> list[Event]:
        try:
            return self._tail.new()
        except OSError as error:
            if not disk.refused(error):
                raise
            return []


def _key(event: Event) -> tuple[float, type[Event]]:
    return event.time, type(event)
