"""What a worker tells its supervisor: by the run's files, or past a disk that refuses them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.job.run.folder import EventTail, RunFolder
from tunesmith.job.run.journal import Journal
from tunesmith.job.run.relay import Receiver
from tunesmith.job.system import disk


@dataclass(frozen=True)
class News:
    """Events, in order, and heartbeats that did not come by their file."""

    events: list[dict[str, Any]]
    heartbeats: list[dict[str, Any]]


class Intake:
    """Reads on from where the events end now. What was handed over is entered in the journal."""

    def __init__(self, run: RunFolder, journal: Journal) -> None:
        self._journal = journal
        self._receiver = Receiver()
        size = run.events_file.stat().st_size if run.events_file.exists() else 0
        self._tail = EventTail(run.events_file, size)
        # Told already: no news any more when the journal has written them.
        self._handed: set[tuple[Any, Any]] = set()

    @property
    def address(self) -> str:
        """What a worker's environment has under relay.RELAY."""
        return self._receiver.address

    def new(self) -> News:
        """Return what was told since the last call."""
        events, heartbeats = [], []
        for message in self._receiver.received():
            if "event" in message:
                self._handed.add(_key(message))
                self._journal.adopt(message)
                events.append(message)
            elif isinstance(heartbeat := message.get("heartbeat"), dict):
                heartbeats.append(heartbeat)
        for event in self._written():
            if _key(event) in self._handed:
                self._handed.discard(_key(event))
            else:
                events.append(event)
        return News(events, heartbeats)

    def _written(self) -> list[dict[str, Any]]:
        try:
            return self._tail.new()
        except OSError as error:
            if not disk.refused(error):
                raise
            return []


def _key(event: dict[str, Any]) -> tuple[Any, Any]:
    return event.get("time"), event["event"]
