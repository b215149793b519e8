"""Check one data file against LLaMA-Factory 0.9.3's rules, before anything is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.dataset.alpaca import check_alpaca
from tunesmith.dataset.columns import Outcome, check_columns, check_dates, check_kinds
from tunesmith.dataset.entry import FORMATTINGS, Entry
from tunesmith.dataset.reading import Reading, read_rows
from tunesmith.dataset.report import DatasetReport, Finding, spread
from tunesmith.dataset.scan import Row
from tunesmith.dataset.sharegpt import check_sharegpt
from tunesmith.dataset.syntax import told

CHECKED_SUFFIXES = (".json", ".jsonl")
OTHER_SUFFIXES = (".csv", ".parquet", ".arrow", ".txt")  # read by LLaMA-Factory, not by us


def check_file(path: Path, entry: Entry, stage: str | None = None) -> DatasetReport:
    """Check a json or jsonl file; all faults go into one report, none is raised.

    `stage` is LLaMA-Factory's (sft, pt, rm, dpo, ppo, kto); None means the one the entry
    is made for: rm for ranking entries, kto for those with a kto_tag, else sft.
    """
    if path.suffix in OTHER_SUFFIXES and path.is_file():
        return unchecked(entry, str(path), f"{path.suffix} files are not checked, only json, jsonl")
    return check_reading(path, read_rows(path), entry, stage)


def unchecked(entry: Entry, file: str, why: str) -> DatasetReport:
    """Return the report of a data set whose rows cannot be looked at here."""
    note = Finding("note", why, "")
    return DatasetReport(entry.key, file, entry.formatting, None, (note,), None, None, None, 0)


def check_reading(
    path: Path, reading: Reading, entry: Entry, stage: str | None = None
) -> DatasetReport:
    """Check rows that were read already; see `check_file`."""
    stage = "rm" if stage == "dpo" else stage or entry.stage()
    findings = [*_file_faults(path, reading, entry, stage)]
    stops = not reading.readable or bool(findings)
    findings += reading.findings
    rows = [row for row in reading.rows if isinstance(row.value, dict)]
    for row in reading.rows:
        if not isinstance(row.value, dict):
            stops = True
            message = f"{told(row.value)}, not an object"
            findings.append(Finding("error", message, "write {...}", row=row.number, line=row.line))
    outcome = Outcome((), stops=True)
    if rows and entry.formatting in FORMATTINGS:
        outcome = _check_rows(path, rows, entry, stage, reading.listed)
    return DatasetReport(
        key=entry.key,
        file=str(path),
        formatting=entry.formatting,
        rows=len(reading.rows),
        findings=(*findings, *outcome.findings),
        sha256=reading.sha256,
        prompt_characters=spread(outcome.prompt_lengths),
        response_characters=spread(outcome.answer_lengths),
        kept=0 if stops or outcome.stops else outcome.kept,
    )


def _file_faults(path: Path, reading: Reading, entry: Entry, stage: str) -> Iterator[Finding]:
    if reading.sha256 is not None and path.suffix not in CHECKED_SUFFIXES:
        allowed = ", ".join(CHECKED_SUFFIXES + OTHER_SUFFIXES)
        message = (
            f"LLaMA-Factory tells the type by the name, {path.suffix or 'no suffix'} is unknown"
        )
        yield Finding("error", message, f"rename it; known are {allowed}")
    if entry.formatting not in FORMATTINGS:
        message = f"formatting {entry.formatting} is unknown to LLaMA-Factory"
        yield Finding("error", message, f"write {' or '.join(FORMATTINGS)} in dataset_info.json")
    if entry.ranking != (stage == "rm"):
        kind = "pairs (ranking: true)" if entry.ranking else "no pairs (ranking: false)"
        message = f"the entry holds {kind}, which stage {stage} refuses"
        yield Finding("error", message, "choose another data set or stage; rm and dpo take pairs")


def _check_rows(path: Path, rows: Sequence[Row], entry: Entry, stage: str, listed: bool) -> Outcome:
    again = f"inv data.register --file {shlex.quote(str(path))} --key {entry.key or path.stem}"
    again += " --replace"
    names = {key for row in rows for key in row.value}
    used = {column for role in entry.used_roles() if (column := entry.column(role))}
    absent = frozenset(used - names)
    by_columns = check_columns(rows, entry, stage, again)
    if entry.formatting == "alpaca":
        by_row = check_alpaca(rows, entry, stage, absent)
    else:
        by_row = check_sharegpt(rows, entry, stage, absent, again)
    blamed = {(f.row, f.field) for f in by_row.findings if f.row is not None and f.field}
    by_kind = check_kinds(rows, listed, blamed)
    by_date = Outcome((), stops=False) if listed else check_dates(rows, entry)
    parts = (by_columns, by_row, by_kind, by_date)
    place = sorted(
        (finding for part in parts for finding in part.findings),
        key=lambda finding: finding.row or 0,
    )
    return Outcome(
        (*place, *_duplicates(rows)),
        any(part.stops for part in parts),
        by_row.kept,
        by_row.prompt_lengths,
        by_row.answer_lengths,
    )


def _duplicates(rows: Sequence[Row]) -> Iterator[Finding]:
    seen: dict[str, Row] = {}
    for row in rows:
        before = seen.setdefault(json.dumps(row.value, sort_keys=True), row)
        if before is not row:
            message = f"the same as row {before.number} (line {before.line})"
            yield Finding("warning", message, "delete one", row=row.number, line=row.line)
