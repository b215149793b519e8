"""What events.jsonl says: a type for each kind of event, read from a line and written as one.

An event that is not known here (of a newer version) is an `OtherEvent`, a line that is none a
`DamagedLine`, so that the others can be read. Standard library only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tunesmith.job.run.codec import Between, Most, decode, named, optional, rest
from tunesmith.job.run.schema import (
    STATES,
    Cause,
    Count,
    Figure,
    FileName,
    Line,
    Loss,
    RunName,
    RunStatus,
    Seconds,
    Values,
    Word,
)
from tunesmith.job.run.stored import parse_json

_Step = Annotated[int, Between(0, 1 << 48)]


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened, and when (seconds since 1970); 0 where a line does not say."""

    NAME: ClassVar[str] = ""

    time: Figure = 0.0

    @staticmethod
    def variant_of(value: Any) -> type[Event]:
        """Return the type of the event that a line's object is."""
        name = value.get("event") if type(value) is dict else None
        return KINDS.get(name, OtherEvent) if isinstance(name, str) else OtherEvent

    def first_keys(self) -> dict[str, Any]:
        """Return what an event's line begins with."""
        return {"time": self.time, "event": self.NAME}


@dataclass(frozen=True, kw_only=True)
class OfPhase(Event):
    """What happens to a phase."""

    phase: Word


@dataclass(frozen=True, kw_only=True)
class InPhase(Event):
    """What happens in a phase; its name may be left out."""

    phase: Word | None = optional()


@dataclass(frozen=True, kw_only=True)
class AtStep(Event):
    """What happens at a step of the training."""

    step: _Step


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A supervisor began; `cause` is None in runs of an older version."""

    NAME = "run_started"

    phases: Annotated[tuple[Word, ...], Most(50)]
    cause: Cause | None = optional()


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """It ended; nothing comes behind it."""

    NAME = "run_ended"

    state: Word
    failure: Word | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(OfPhase):
    """A worker of a phase begins."""

    NAME = "phase_started"

    attempt: Annotated[int, Between(0, 1 << 32)] = 1


@dataclass(frozen=True, kw_only=True)
class PhaseEnded(OfPhase):
    """A phase is over, after all its attempts."""

    NAME = "phase_ended"

    state: Word
    seconds: Seconds = 0.0


@dataclass(frozen=True, kw_only=True)
class Resumed(AtStep):
    """The training goes on from a checkpoint."""

    NAME = "resumed"

    total_steps: _Step | None = None
    checkpoint: Line | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(AtStep):
    """A checkpoint was written and sealed; `bytes` in all, in `seconds`."""

    NAME = "checkpoint"

    path: Line = ""
    bytes: Count | None = None
    seconds: Figure | None = None


@dataclass(frozen=True, kw_only=True)
class Discarded(Event):
    """A checkpoint is not used."""

    NAME = "discarded"

    checkpoint: Line
    why: Line


@dataclass(frozen=True, kw_only=True)
class Changed(Event):
    """The job runner does something otherwise than the config says."""

    NAME = "changed"

    what: Line
    before: Any = named("from", default=None)
    to: Any = None
    why: Line = ""


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """The work waits for its disk."""

    NAME = "paused"

    why: Line = ""
    step: _Step | None = None


@dataclass(frozen=True, kw_only=True)
class Continued(Event):
    """It goes on."""

    NAME = "continued"

    step: _Step | None = None


@dataclass(frozen=True, kw_only=True)
class Failure(InPhase):
    """A worker failed, and with which class; `retry` overrules the class's own. `rank` is the one
    of several processes that failed first."""

    NAME = "failure"

    failure: Word
    message: Line
    detail: Line | Annotated[tuple[Line, ...], Most(1000)] = ()
    retry: bool | None = optional()
    rank: int | None = optional()

    @property
    def lines(self) -> tuple[str, ...]:
        """The detail, line by line."""
        return (self.detail,) if isinstance(self.detail, str) else self.detail


@dataclass(frozen=True, kw_only=True)
class Restarting(OfPhase):
    """A phase is begun again after a failure."""

    NAME = "restarting"

    why: Line
    failure: Word | None = None


@dataclass(frozen=True, kw_only=True)
class Log(InPhase):
    """The figures of one step. A figure that JSON cannot hold may be text."""

    NAME = "log"

    step: _Step
    total_steps: _Step | None = None
    loss: Loss | Line | None = None
    learning_rate: Loss | Line | None = None
    grad_norm: Loss | Line | None = None
    tokens_per_second: Loss | Line | None = None
    epoch: Loss | Line | None = None
    others: Values = rest()


@dataclass(frozen=True, kw_only=True)
class Evaluated(AtStep):
    """The held-out loss at a step."""

    NAME = "eval"

    loss: Loss | None


@dataclass(frozen=True, kw_only=True)
class Progress(InPhase):
    """How far a phase without steps is."""

    NAME = "progress"

    done: Annotated[float, Between(0)]
    total: Annotated[float, Between(0)] | None
    unit: Line


@dataclass(frozen=True, kw_only=True)
class Summary(InPhase):
    """What a phase that succeeded has to say of its results; `results` are its own."""

    NAME = "summary"

    peak_memory: Mapping[Word, Figure] | None = optional()
    metrics: Mapping[Line, Any] | None = optional()
    output: Line | None = optional()
    results: Values = rest()


@dataclass(frozen=True, kw_only=True)
class Note(InPhase):
    """Something that people should know."""

    NAME = "note"

    text: Line


@dataclass(frozen=True, kw_only=True)
class Queued(Event):
    """The run waits; `ahead` are those before it, in order."""

    NAME = "queued"

    ahead: tuple[RunName, ...]


@dataclass(frozen=True, kw_only=True)
class LimitReached(Event):
    """The run has used up what it may, and stops behind a checkpoint."""

    NAME = "limit"

    what: Line
    seconds: Seconds | None = None


@dataclass(frozen=True, kw_only=True)
class CommandAnnounced(Event):
    """What follows the success is about to be done."""

    NAME = "after_command"

    text: Line
    command: tuple[FileName, ...] = ()
    seconds: Seconds | None = optional()
    when: Word | None = optional()


@dataclass(frozen=True, kw_only=True)
class CommandEnded(Event):
    """It was done; `code` None: it was not, and `why`."""

    NAME = "after_command_ended"

    code: Annotated[int, Between(-10_000, 10_000)] | None
    why: Line | None = None


@dataclass(frozen=True, kw_only=True)
class OtherEvent(Event):
    """One that is not known here."""

    event: Word
    fields: Values = rest()

    def first_keys(self) -> dict[str, Any]:
        """Return what an event's line begins with."""
        return {"time": self.time, "event": self.event}


@dataclass(frozen=True, kw_only=True)
class DamagedLine(Event):
    """What stands for a line that is no event: the byte it begins at, and why."""

    NAME = "damaged_line"

    byte: Count
    why: Line


_KINDS: tuple[type[Event], ...] = (
    *(RunStarted, RunEnded, PhaseStarted, PhaseEnded, Resumed, Checkpoint, Discarded, Changed),
    *(Paused, Continued, Failure, Restarting, Log, Evaluated, Progress, Summary, Note, Queued),
    *(LimitReached, CommandAnnounced, CommandEnded, DamagedLine),
)
KINDS: Mapping[str, type[Event]] = {kind.NAME: kind for kind in _KINDS}


def line_of(name: str, fields: Mapping[str, Any]) -> bytes:
    """Return an event of now as a line. NaN and Infinity are written as JavaScript names them."""
    value = {"time": time.time(), "event": name, **fields}
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def parse(line: bytes, offset: int) -> Event:
    """Return the event of a line that begins at a byte, or a DamagedLine."""
    try:
        return decode(Event, parse_json(line))
    except ValueError as error:
        return DamagedLine(byte=offset, why=str(error))


class EventTail:
    """Reads a growing events.jsonl piece by piece; only whole lines are taken."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        self.cut = False

    def new(self, limit: int = -1) -> list[Event]:
        """Return the events written since the last call, in order.

        With `limit` about that many bytes of them, at least one whole line; `cut` then says
        whether the limit was met. A whole line that is no event is a DamagedLine, so that the
        others can be read.
        """
        return [parse(line, offset) for offset, line in self.lines(limit)]

    def lines(self, limit: int = -1) -> list[tuple[int, bytes]]:
        """Return offset and content of the lines written since the last call."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self.offset)
                content = stream.read(limit)
                self.cut = 0 <= limit <= len(content)
                if self.cut and b"\n" not in content:
                    content += stream.readline()
        except FileNotFoundError:
            return []
        found = []
        for line in content.split(b"\n")[:-1]:
            # A power loss can leave a hole of zero bytes where a line should be.
            if text := line.strip(b"\0 "):
                found.append((self.offset, text))
            self.offset += len(line) + 1
        return found


def read_events(path: Path) -> list[Event]:
    """Return all events of a file in order.

    A torn last line (power loss) is left out, and so are damaged lines: `damaged_lines`.
    """
    return [event for event in EventTail(path).new() if not isinstance(event, DamagedLine)]


def damaged_lines(path: Path) -> list[str]:
    """Return where lines of a file of events are damaged, and why."""
    return [
        f"the line at byte {event.byte} is damaged: {event.why}"
        for event in EventTail(path).new()
        if isinstance(event, DamagedLine)
    ]


def mend_events(path: Path) -> None:
    """Cut a torn last line off, so that the next event starts on a line of its own."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)


def with_step(status: RunStatus, log: Log) -> RunStatus:
    """Return a status with the figures of a step; a figure that is no number is none."""
    return replace(
        status,
        step=log.step,
        total_steps=log.total_steps,
        loss=_figure(log.loss),
        learning_rate=_figure(log.learning_rate),
        tokens_per_second=_figure(log.tokens_per_second),
    )


def _figure(value: float | str | None) -> float | None:
    return None if isinstance(value, str) else value


def status_from(found: Iterable[Event], run_id: str) -> RunStatus:
    """Return the status that a run's events tell of; `state` is running where no end is told."""
    status = RunStatus(run_id=run_id, state="running", step=0)
    phases: dict[str, str] = {}
    for event in found:
        if isinstance(event, RunStarted):
            began = status.started or event.time or None
            cause = event.cause or status.cause
            status = replace(status, started=began, state="running", cause=cause)
            phases |= dict.fromkeys(event.phases, "queued")
        elif isinstance(event, PhaseStarted):
            status = replace(status, phase=event.phase)
            phases[event.phase] = "running"
        elif isinstance(event, PhaseEnded):
            phases[event.phase] = event.state
        elif isinstance(event, Log):
            status = with_step(status, event)
        elif isinstance(event, RunEnded):
            status = replace(status, state=next((s for s in STATES if s == event.state), "running"))
    return replace(status, phases=phases)
