"""What tunesmith on a host says of its runs and services, read within bounds.

Of runs it is the types of job/run/replies.py, of services the shapes of what
job/services/manager.py says. A host may answer anything; what does not fit is refused before it
is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tunesmith.core.documents import JsonObject
from tunesmith.hosts.answers import (
    WORD,
    AnswerSource,
    Each,
    Flag,
    Maybe,
    Named,
    Number,
    Record,
    Shape,
    Text,
    Words,
)
from tunesmith.job.run.codec import Fault, decode

T = TypeVar("T")
_LINE = Words(2000)


def read(asked: AnswerSource, kind: type[T], value: Any) -> T:
    """Return an answer of the agent as its type. Raises TunesmithError when it is none."""
    try:
        return decode(kind, value, foreign=True)
    except Fault as fault:
        dot = "" if fault.at.startswith("[") or not fault.at else "."
        place = replace(asked, what=f"{asked.what}{dot}{fault.at}")
        expected = f"an object with {fault.expected}" if fault.missing else fault.expected
        raise place.refused(expected, fault.value) from None


_TRAINING = Record({"folder": Words()})
# People paste it behind `export API_KEY=`.
_KEY = Text(r"[A-Za-z0-9_-]+", 200, "a key of letters, digits, _ and -")
_RUNNING = Record(
    {"port": Number(1, 65535), "log": Words(), "serves": Named(WORD, Words(), 50)},
    {
        "key": Maybe(_KEY),
        "token": Maybe(_KEY),
        "tail": Each(_LINE, 1000),
        "training": Maybe(_TRAINING),
        "reused": Flag(),
    },
)


@dataclass(frozen=True)
class Service:
    """What tunesmith.job.services.manager says of a service: the keys go with its state."""

    verb: str

    def read(self, asked: AnswerSource, value: Any) -> JsonObject:
        """Return the state."""
        state = Record({"state": WORD}, {"training": Maybe(_TRAINING)}).read(asked, value)
        must: dict[str, Shape] = {"reused": Flag(), "key": Maybe(_KEY)}
        must = must if self.verb == "start" else {}
        must |= {"training": _TRAINING} if state["state"] == "kept" else {}
        Record(must).read(asked, value)
        if state["state"] == "absent" or (self.verb == "stop" and state["state"] != "kept"):
            return state
        found: JsonObject = _RUNNING.read(asked, value)
        return found
