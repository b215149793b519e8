"""What a worker tells its supervisor: by the run's files, or past a disk that refuses them."""

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
    """Events, in order, and heartbeats that did not come by their file."""

    events: list[Event]
    heartbeats: list[Heartbeat]


class Intake:
    """Reads on from where the events end now. What was handed over is entered in the journal."""

    def __init__(self, run: RunFolder, journal: Journal) -> None:
        self._journal = journal
        self._receiver = Receiver()
        size = run.events_file.stat().st_size if run.events_file.exists() else 0
        self._tail = EventTail(run.events_file, size)
        # Told already: no news any more when the journal has written them.
        self._handed: set[tuple[float, type[Event]]] = set()

    @property
    def address(self) -> str:
        """What a worker's environment has under relay.RELAY."""
        return self._receiver.address

    def new(self) -> News:
        """Return what was told since the last call."""
        found, heartbeats = [], []
        for message in self._receiver.received():
            # What the user's own code may have put into the pipe is nobody's word.
            with contextlib.suppress(Fault):
                if "event" in message:
                    event = decode(Event, message)
                    self._handed.add(_key(event))
                    self._journal.adopt(event)
                    found.append(event)
                elif "heartbeat" in message:
                    heartbeats.append(decode(Heartbeat, message["heartbeat"]))
        for event in self._written():
            if _key(event) in self._handed:
                self._handed.discard(_key(event))
            else:
                found.append(event)
        return News(found, heartbeats)

    def _written(self) -> list[Event]:
        try:
            return self._tail.new()
        except OSError as error:
            if not disk.refused(error):
                raise
            return []


def _key(event: Event) -> tuple[float, type[Event]]:
    return event.time, type(event)
