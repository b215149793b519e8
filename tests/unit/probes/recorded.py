"""Answers of the probe, one file a host, each beside what it must be judged as."""

from __future__ import annotations

from pathlib import Path

from tunesmith.doctor.facts import SECTIONS, Facts
from tunesmith.doctor.facts import facts_of as read
from tunesmith.hosts.probe.answer import Answer

FOLDER = Path(__file__).parent


def facts_of(name: str, *changes: tuple[str, str]) -> Facts:
    """Return a recorded probe's facts, with texts of the record replaced."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse(text)


def parse(text: str, host: str = "the host") -> Facts:
    """Return the facts in an answer for the sections of host.check."""
    return read(Answer(text, host, SECTIONS), "llama-factory")
