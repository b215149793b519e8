"""What a run folder holds, read once, with a note for everything that is missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.job.run import integrity, seals
from tunesmith.job.run.codec import Fault, decode
from tunesmith.job.run.events import Event, damaged_lines, read_events
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.results import AnswerRow, Evaluation, Parity, Proof
from tunesmith.job.run.schema import RunRequest, RunStatus
from tunesmith.job.run.stored import DamagedError, parse_json, read_plain

Row = dict[str, Any]

NOT_THERE = "is not there"
GUARD = "guard"  # the set of general prompts that shows what was forgotten


@dataclass(frozen=True, slots=True)
class Missing:
    """A file that is absent or damaged: what the page lacks, why, and what gets it.

    `asked` is False where the run was never meant to have it (no merge, no evaluation).
    """

    file: str
    gives: str
    why: str
    command: str
    asked: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """The files of one run as values; empty where a file is missing."""

    run_id: str
    run: RunRequest
    config: Row
    status: RunStatus | None
    events: tuple[Event, ...]
    before: tuple[Row, ...]
    after: tuple[Row, ...]
    evaluation: Row
    proof: Row
    parity: Row
    versions: Row
    missing: tuple[Missing, ...]


# file -> (what the page shows from it, the phase that writes it)
FILES = {
    "config.yaml": ("the parameters", ""),
    "status.json": ("the state of the run", ""),
    "events.jsonl": ("the curve and the timings", ""),
    "before.jsonl": ("the answers of the base model", "before"),
    "after.jsonl": ("the answers of the tuned model", "after"),
    "evaluation.json": ("the held-out loss", "before"),
    "parity.json": ("the comparison of prompts", "merge"),
    "proof.json": ("the proof of the merged model", "proof"),
    "versions.json": ("the versions", ""),
}


def read_record(run_dir: Path) -> Record:
    """Read a run folder.

    Raises UsageError where run.json is absent, or where answers, measures or proof are not those
    that were sealed; any other file may be absent or damaged.
    """
    folder = RunFolder(run_dir)
    run = folder.request()
    faults: dict[str, str] = {}

    def take(name: str, read: Callable[[Path], Any], empty: Any) -> Any:
        try:
            value = read(run_dir / name)
        except FileNotFoundError:
            why = NOT_THERE
        except DamagedError as error:
            why = f"damaged: {error.why}"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = "damaged: " + " ".join(str(error).split())[:200]
        else:
            if isinstance(value, type(empty)):
                return value
            why = f"damaged: holds {type(value).__name__}, not {type(empty).__name__}"
        faults[name] = why
        return empty

    status = folder.status() if folder.status_file.exists() else None
    if status is None:
        faults["status.json"] = NOT_THERE
    if status is None or not status.active:  # else they are being written
        seals.check(run_dir, integrity.READS[integrity.REPORT], adopt=False)
    record = Record(
        run_id=folder.run_id,
        run=run,
        config=take("config.yaml", lambda _: folder.config(), {}),
        status=status,
        events=tuple(take("events.jsonl", _read_events, [])),
        before=tuple(take("before.jsonl", _read_answers, [])),
        after=tuple(take("after.jsonl", _read_answers, [])),
        evaluation=take("evaluation.json", _checked(Evaluation), {}),
        proof=take("proof.json", _checked(Proof), {}),
        parity=take("parity.json", _checked(Parity), {}),
        versions=take("versions.json", _checked(None), {}),
        missing=(),
    )
    if status and status.failure == "damaged":
        faults["status.json"] = "damaged: " + (status.message or "").partition("damaged: ")[2]
    if lines := damaged_lines(folder.events_file):
        # The others are shown.
        faults["events.jsonl"] = f"damaged: {lines[0]}"
    missing = [_missing(name, why, run, status) for name, why in faults.items()]
    return replace(record, missing=tuple(missing))


def pair_answers(
    before: Sequence[Row], after: Sequence[Row]
) -> list[tuple[str, Row | None, Row | None]]:
    """Put the answers to the same prompt side by side: (set, before, after).

    The prompts set comes first, the guard set last. A prompt asked twice pairs in order.
    """

    def keyed(rows: Sequence[Row]) -> dict[tuple[str, str, int], Row]:
        found: dict[tuple[str, str, int], Row] = {}
        turns: Counter[tuple[str, str]] = Counter()
        for row in rows:
            key = str(row.get("set", "prompts")), str(row.get("prompt", ""))
            found[(*key, turns[key])] = row
            turns[key] += 1
        return found

    first, second = keyed(before), keyed(after)
    order = {"prompts": 0, GUARD: 2}
    keys = sorted(dict.fromkeys([*first, *second]), key=lambda key: order.get(key[0], 1))
    return [(key[0], first.get(key), second.get(key)) for key in keys]


def met_of(rows: Sequence[Row], *, guard: bool = False) -> tuple[int, int] | None:
    """Return (met, of) over the rows that expect something, None where none does.

    Over the user's rows, or with `guard` over the guard set.
    """
    asked = [row for row in rows if (row.get("set") == GUARD) is guard]
    judged = [bool(row["met"]) for row in asked if row.get("met") is not None]
    return (sum(judged), len(judged)) if judged else None


def _missing(name: str, why: str, run: RunRequest, status: RunStatus | None) -> Missing:
    gives, phase = FILES[name]
    asked = not phase or phase in (run.phases or ())
    again = f"inv train --config {shlex.quote(run.config_file or 'CONFIG')}"
    run_id = shlex.quote(run.run_id)
    if not asked and why == NOT_THERE:
        why = "was not part of this run"
    if status and status.active:
        command = f"inv attach --run {run_id}"
    elif phase in ("merge", "proof"):
        command = f"inv merge --run {run_id}"
    elif status and status.state == "succeeded":
        command = again  # nothing is left to resume
    else:
        command = f"inv resume --run {run_id}"
    return Missing(name, gives, why, command, asked)


def _checked(kind: type | None) -> Callable[[Path], Row]:
    """Return a reader of a JSON object that is a `kind` and may have more."""

    def read(path: Path) -> Row:
        value = parse_json(read_plain(path, ""))
        if not isinstance(value, dict):
            raise Fault("an object", value)
        if kind is not None:
            decode(kind, value)
        return value

    return read


def _read_events(path: Path) -> list[Event]:
    if not path.exists():
        raise FileNotFoundError(path)
    return read_events(path)


def _read_answers(path: Path) -> list[Row]:
    """Return the rows of a file of answers. Raises ValueError naming a line that is none."""
    rows = []
    # What stands behind the last line's end was being written.
    for number, line in enumerate(read_plain(path, "").split(b"\n")[:-1], 1):
        if not line.strip(b"\0 \r"):
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        try:
            decode(AnswerRow, row)
        except Fault as fault:
            raise ValueError(f"line {number}: {fault}") from None
        rows.append(row)
    return rows
