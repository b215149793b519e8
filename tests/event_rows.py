"""The events of a run as the objects of their lines, for tests that look at one or two keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import read_events


def event_rows(file: Path) -> list[dict[str, Any]]:
    """Return the events of a file in order, those that are damaged left out."""
    return [encode(event) for event in read_events(file)]
