"""The content of parity.json."""

from __future__ import annotations

from typing import TypedDict


class DifferenceRecord(TypedDict):
    """A Difference in parity.json."""

    renderer: str
    probe: str
    at: int
    expected: str
    found: str


class Correction(TypedDict):
    """A replaced file of the export, with its text (or value) before and after."""

    file: str
    was: str
    now: str


class ParityRecord(TypedDict, total=False):
    """The content of parity.json: a Verdict, and the corrections made before it."""

    passed: bool
    accepted: bool  # merged although it did not pass
    probes: int
    rows: int
    ids: int
    prompt: str
    stop: str
    differences: list[DifferenceRecord]
    ends: list[str]
    notes: list[str]
    corrected: list[Correction]
    before: list[str]  # faults before the corrections
