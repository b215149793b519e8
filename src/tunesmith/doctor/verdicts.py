"""What a rule says: one line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "info", "warning", "critical", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """One line of the doctor: what was looked at, what was found, how to fix it.

    `unknown` is for what could not be seen from the host: it is no pass.
    """

    level: Level
    what: str
    text: str
    fix: str = ""
