"""What a run folder holds, read once, with a note for everything that is missing."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.job.run import integrity, records, seals
from tunesmith.job.run.folder import RunFolder, damaged_lines, read_events
from tunesmith.job.run.shapes import Check
from tunesmith.job.run.stored import DamagedError, parse_json, read_object, read_plain

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
    run: Row
    config: Row
    status: Row
    events: tuple[Row, ...]
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

    status = take("status.json", lambda _: _read_status(folder), {})
    if status.get("state") not in ("queued", "running"):  # else they are being written
        seals.check(run_dir, integrity.READS[integrity.REPORT], adopt=False)
    record = Record(
        run_id=str(run.get("run_id", folder.run_id)),
        run=run,
        config=take("config.yaml", lambda _: folder.config(), {}),
        status=status,
        events=tuple(take("events.jsonl", _read_events, [])),
        before=tuple(take("before.jsonl", _read_answers, [])),
        after=tuple(take("after.jsonl", _read_answers, [])),
        evaluation=take("evaluation.json", _reader(records.EVALUATION), {}),
        proof=take("proof.json", _reader(records.PROOF), {}),
        parity=take("parity.json", _reader(records.PARITY), {}),
        versions=take("versions.json", _reader(records.VERSIONS), {}),
        missing=(),
    )
    if status.get("failure") == "damaged":
        faults["status.json"] = "damaged: " + str(status["message"]).partition("damaged: ")[2]
    if lines := damaged_lines(folder.events_file):
        # The others are shown.
        faults["events.jsonl"] = f"damaged: {lines[0]}"
    missing = [_missing(name, why, run, status, record.run_id) for name, why in faults.items()]
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


def _missing(name: str, why: str, run: Row, status: Row, run_id: str) -> Missing:
    gives, phase = FILES[name]
    asked = not phase or phase in run.get("phases", [])
    again = f"inv train --config {shlex.quote(str(run.get('config_file', 'CONFIG')))}"
    run_id = shlex.quote(run_id)
    if not asked and why == NOT_THERE:
        why = "was not part of this run"
    if status.get("state") in ("queued", "running"):
        command = f"inv attach --run {run_id}"
    elif phase in ("merge", "proof"):
        command = f"inv merge --run {run_id}"
    elif status.get("state") == "succeeded":
        command = again  # nothing is left to resume
    else:
        command = f"inv resume --run {run_id}"
    return Missing(name, gives, why, command, asked)


def _read_status(folder: RunFolder) -> Row:
    """The status as readers should see it: a run whose owner died is not running."""
    if not folder.status_file.exists():
        raise FileNotFoundError(folder.status_file)
    return folder.status()


def _reader(check: Check) -> Callable[[Path], Row]:
    return lambda path: read_object(path, check, "")


def _read_events(path: Path) -> list[Row]:
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
        if fault := records.ANSWER(row, f"line {number}"):
            raise ValueError(fault)
        rows.append(row)
    return rows
