"""Runs tests/state against a live host or an image: is what we promise there?"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core import isolated
from tunesmith.core.errors import TunesmithError
from tunesmith.hosts import inventory as inventories
from tunesmith.hosts.remote import Remote
from tunesmith.project import Project

# Address space of the tests, in bytes: they have 0.2 GB.
_MOST_MEMORY = 1 << 30


@dataclass(frozen=True)
class Promise:
    """One test: what it says, whether it holds, and why not (or why it was skipped)."""

    text: str
    outcome: Literal["passed", "failed", "skipped"]
    why: str = ""


@dataclass(frozen=True)
class Verified:
    """What was found on a host."""

    name: str
    promises: tuple[Promise, ...]
    seconds: float

    def count(self, outcome: str) -> int:
        """Return how many promises ended this way."""
        return sum(promise.outcome == outcome for promise in self.promises)

    @property
    def good(self) -> bool:
        """Whether every promise holds."""
        return not self.count("failed")


def _bounded() -> None:
    """Bound the address space of the process to come: testinfra reads whatever a host sends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))


def verify(project: Project, name: str) -> Verified:
    """Run the state suite over SSH; it changes nothing there.

    Raises UsageError for an unknown host, TunesmithError when the host cannot be reached or
    pytest could not run.
    """
    # Here ssh says in one line what is wrong; in a test it would say it once a test.
    Remote(name, project.inventory).run("exit 0")
    ssh_config = f"--ssh-config={inventories.ssh_config(project.inventory)}"
    return run_suite(project, name, f"--hosts=ssh://{name}", ssh_config)


def run_suite(project: Project, name: str, *connection: str) -> Verified:
    """Run tests/state with testinfra's options for a connection; `name` is for people.

    Raises TunesmithError when pytest could not run.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.jsonl"
        argv = [
            # -B: nothing is left beside the tests, which may belong to somebody else.
            *isolated.argv(sys.executable, "pytest", options=("-B",)),
            *("-p", "no:cacheprovider", "--quiet"),
            *connection,
            *(f"--state-results={results}", str(project.root / "tests" / "state")),
        ]
        done = subprocess.run(
            argv,
            cwd=project.root,
            capture_output=True,
            text=True,
            check=False,
            # macOS knows no such limit.
            preexec_fn=_bounded if sys.platform == "linux" else None,
        )
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    promises = tuple(Promise(**json.loads(line)) for line in lines)
    verified = Verified(name, promises, time.monotonic() - began)
    # 0: all passed, 1: some failed. Anything else, or silence, is not an answer.
    if done.returncode not in (0, 1) or not promises or verified.good != (done.returncode == 0):
        raise TunesmithError(
            f"{name}: the tests could not run (pytest ended with exit code {done.returncode})",
            [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-12:],
        )
    return verified
