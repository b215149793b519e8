"""How every benchmark measures: a process of its own, both sides by turns, one ratio.

Wall time, processor time and peak memory of a child are the kernel's (wait4): processor time
with that of its waited-for children, peak memory that of its largest process. The sides are
interleaved (A B A B A), so that a machine that grows slower meanwhile slows both; medians are
compared.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """One run of one side: wall and processor seconds, peak resident bytes of a process."""

    wall: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Result:
    """One row of results.json.

    `ours` and `other` are medians in `unit`; `ratio` is how many times better ours is (or as the
    bar says), None where nothing is compared. `bar` is the goal in words, `met` whether it is
    reached; `why` says what keeps it from that. `commands` are both sides' commands, so that
    anyone can repeat them. `detail` holds further figures and series for plots.
    """

    id: str
    what: str
    ours: float
    other: float | None
    unit: str
    ratio: float | None
    bar: str
    met: bool
    why: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)


def plain_env(**changes: str) -> dict[str, str]:
    """Return the variables both sides get: a user's, without what would bend a figure.

    Python's own variables are left out (bytecode is read and written as usual), the hub is not
    asked, and the waiting of threads is that of our jobs (configs/stack.yml).
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }
    return kept | fixed | changes


class CommandFailed(Exception):
    """A side ended with an error: there is no figure. The text ends with its output's end."""


def measure(
    argv: Sequence[str | Path],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Measured:
    """Run one command to its end, its output to `log`; raise CommandFailed unless it succeeds."""
    words = [str(word) for word in argv]
    with log.open("wb") as output:
        started = time.monotonic()
        child = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=dict(env or os.environ), cwd=cwd
        )
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise CommandFailed(f"{' '.join(words)}: exit code {child.returncode}\n{tail}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def interleave(
    sides: Mapping[str, Callable[[int], Measured]],
    turns: str,
    say: Callable[[str], None],
) -> dict[str, list[Measured]]:
    """Run the sides by turns, as in "ABABA"; each is called with the number of its turn."""
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for side in turns:
        one = sides[side](len(found[side]))
        found[side].append(one)
        say(f"  {side}: {one.wall:.2f} s wall, {one.cpu:.2f} s cpu, {one.peak / 1e6:.0f} MB")
    return found


def middle(measured: Sequence[Measured]) -> Measured:
    """Return the medians of several runs."""
    return Measured(
        median(one.wall for one in measured),
        median(one.cpu for one in measured),
        int(median(one.peak for one in measured)),
    )
