"""What tunesmith on a host says of its runs and services: the shapes of its answers.

They are those of job/supervisor/agent.py and job/services/manager.py. A host may answer anything;
what does not have the shape is refused before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.hosts.answers import (
    DIGEST,
    RUN_ID,
    WORD,
    Asked,
    Each,
    Flag,
    Free,
    Maybe,
    Named,
    Number,
    OneOf,
    Real,
    Record,
    Shape,
    Text,
    Words,
)
from tunesmith.job.run.folder import STATES
from tunesmith.job.run.records import CAUSES

_LINE = Words(2000)
# A loss may be no number any more; a rate or a time may not.
_LOSS = Real(finite=False)
_SECONDS = Real(0, 1e10)
_STEP = Number(0, 1 << 48)

_GPU = Record(
    must={
        "memory_used": Maybe(Number()),
        "memory_total": Maybe(Number()),
        "utilisation": Maybe(Number(0, 1000)),
    },
    may={"name": _LINE, "temperature": Maybe(Number(-1000, 1000))},
)
_STATUS = Record(
    must={"run_id": RUN_ID, "state": OneOf(STATES), "phases": Named(WORD, WORD, 50)},
    may={
        "failure": Maybe(WORD),
        "message": Maybe(_LINE),
        "detail": Each(_LINE, 1000),
        "phase": Maybe(WORD),
        "step": Maybe(_STEP),
        "total_steps": Maybe(_STEP),
        "loss": Maybe(_LOSS),
        "learning_rate": Maybe(_LOSS),
        "tokens_per_second": Maybe(Real(0, 1e12)),
        "eta_seconds": Maybe(_SECONDS),
        "worked_seconds": Maybe(_SECONDS),
        "price": Maybe(Real(0, 1e9)),
        "gpu": Maybe(Each(_GPU, 1024)),
        "ahead": Each(RUN_ID),
        # Not of an older tunesmith there.
        "cause": OneOf(CAUSES),
        "retried": WORD,
        "created": _LINE,
        "title": _LINE,
        "path": _LINE,
    },
)


@dataclass(frozen=True)
class _Status:
    """A status, with the keys that people are told of."""

    def read(self, asked: Asked, value: Any) -> dict[str, Any]:
        status = _STATUS.read(asked, value)
        return {"failure": None, **status, "message": status.get("message") or ""}


STATUS: Shape = _Status()

_EVENTS: Mapping[str, Record] = {
    "run_started": Record(may={"phases": Each(WORD, 50), "cause": OneOf(CAUSES)}),
    "phase_started": Record({"phase": WORD, "attempt": Number(0, 1 << 32)}),
    "phase_ended": Record({"phase": WORD, "state": WORD, "seconds": _SECONDS}),
    "progress": Record({"done": Real(0), "total": Maybe(Real(0)), "unit": _LINE}),
    "log": Record({"step": _STEP}, {"loss": Maybe(_LOSS)}),
    "resumed": Record({"step": _STEP, "total_steps": _STEP}),
    "discarded": Record({"checkpoint": _LINE, "why": _LINE}),
    "changed": Record({"what": _LINE, "from": Free(), "to": Free(), "why": _LINE}),
    "paused": Record({"why": _LINE}),
    "failure": Record({"failure": WORD, "message": _LINE}),
    "restarting": Record({"phase": WORD, "why": _LINE}),
    "eval": Record({"step": _STEP, "loss": _LOSS}),
    "note": Record({"text": _LINE}),
    "queued": Record({"ahead": Each(RUN_ID)}),
    "limit": Record({"what": _LINE}),
    "after_command": Record({"text": _LINE}),
    "after_command_ended": Record({"code": Maybe(Number(-10_000, 10_000)), "why": Maybe(_LINE)}),
    "summary": Record(may={"metrics": Named(_LINE, Free()), "output": _LINE}),
}


@dataclass(frozen=True)
class _Event:
    """One event, by its name; a name that is not known here is only kept."""

    def read(self, asked: Asked, value: Any) -> dict[str, Any]:
        found: dict[str, Any] = Record({"event": WORD}).read(asked, value)
        shape = _EVENTS.get(found["event"])
        return found if shape is None else shape.read(asked.at(found["event"]), found)


@dataclass(frozen=True)
class _Name:
    """A file's name as the host has it: what is wrong with one is told where it is used."""

    def read(self, asked: Asked, value: Any) -> str:
        if not isinstance(value, str) or not value or len(value) > 4096:
            raise asked.refused("a file name", value)
        return value


_RUN = Record({"run_id": RUN_ID})
_REQUEST = Record(
    must={
        "model": Record(
            {
                "name": Words(500),
                "files": Named(Words(500), Record({"size": Number(), "sha256": DIGEST})),
            }
        )
    },
    may={
        "limits": Named(WORD, Free()),
        "merge": Named(WORD, Free()),
        "then": Maybe(Each(WORD, 50)),
        "phases": Each(WORD, 50),
    },
)
# By the agent's verb.
AGENT: Mapping[str, Shape] = {
    "create": _RUN,
    "renew": _RUN,
    "start": _RUN,
    "stop": _RUN,
    "find": _RUN,
    "show": Record(
        {"request": _REQUEST, "config": Maybe(Named(Words(200), Free())), "status": STATUS}
    ),
    "runs": Record({"runs": Each(STATUS, 100_000)}),
    "watch": Record(
        {
            "status": STATUS,
            "events": Each(_Event(), 1_000_000),
            "events_offset": Number(),
            "log_offset": Number(-1),
        },
        # A piece of watch.py is a quarter of this.
        {"log": Words(1 << 20), "more": Flag()},
    ),
    "manifest": Record(
        {
            "files": Named(
                _Name(), Record({"size": Number(), "sha256": DIGEST}, {"path": Words()}), 200_000
            )
        }
    ),
    "remove": Record({"freed": Number()}, {"left": Words()}),
    "afterwards": Record({"code": Maybe(Number(-10_000, 10_000)), "why": Maybe(_LINE)}),
    "resume-all": Record({"started": Each(RUN_ID), "refused": Named(RUN_ID, _LINE)}),
}
REFUSAL = Record({"error": _LINE}, {"detail": Each(_LINE, 1000)})

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

    def read(self, asked: Asked, value: Any) -> dict[str, Any]:
        """Return the state."""
        state = Record({"state": WORD}, {"training": Maybe(_TRAINING)}).read(asked, value)
        must: dict[str, Shape] = {"reused": Flag(), "key": Maybe(_KEY)}
        must = must if self.verb == "start" else {}
        must |= {"training": _TRAINING} if state["state"] == "kept" else {}
        Record(must).read(asked, value)
        if state["state"] == "absent" or (self.verb == "stop" and state["state"] != "kept"):
            return state
        found: dict[str, Any] = _RUNNING.read(asked, value)
        return found
