"""The training environment from wheels that are here: `inv stack.install` against pip.

Both install the same hashed lock from the same folder of wheels, without a network, into a new
environment. pip makes the bytecode of all modules; ours makes that of the modules which jobs
import, half of them (`uncompiled` in configs/stack.yml; tests/e2e/test_bytecode.py holds it to
that), and then asks the environment for its versions, which pip's side does not. uv's cache is
warm, as it is on a machine that has installed before; pip unpacks each wheel anew, it has no such
cache. The gate: the same distributions in the same versions, and `llamafactory-cli version`
finds no module whose bytecode it has to make.

Eight GB an environment: pip's is made once, between two of ours, and each is deleted before the
next.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.harness import (
    ROOT,
    CommandFailed,
    Measured,
    Result,
    interleave,
    measure,
    middle,
    plain_env,
)
from tunesmith.core import formats
from tunesmith.project import Project
from tunesmith.stack.environment import find_python

ROOM = 30_000_000_000  # bytes: wheels, uv's cache (the environment is links into it), pip's own
BAR = 5.0
# What one side brings and the other needs not.
_TOOLS = {"pip", "setuptools", "wheel", "tunesmith"}
PROBE = """
import json
from importlib.metadata import distributions
print(json.dumps({d.metadata["Name"].lower(): d.version for d in distributions()}))
"""


def run(work: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure, if the disk is large enough; else say so and return nothing."""
    free = shutil.disk_usage(work).free
    if free < ROOM:
        say(f"  skipped: {formats.size(free)} free, {formats.size(ROOM)} are needed")
        return []
    bench = _Bench(work)
    say("  fetching the wheels of the lock ...")
    bench.fetch()
    say("  filling uv's cache ...")
    bench.ours(0)
    found = interleave({"A": bench.theirs, "B": bench.ours}, "BAB", say)
    if len(set(bench.installed.values())) != 1:
        raise CommandFailed("the two sides did not install the same distributions")
    ours, other = middle(found["B"]), middle(found["A"])
    ratio = other.wall / ours.wall
    why = "what remains is linking and compiling bytecode; ours compiles on all CPUs, pip on one"
    return [
        Result(
            id="install",
            what="training environment from local wheels, with the bytecode that jobs need (pip "
            "compiles all)",
            ours=round(ours.wall, 1),
            other=round(other.wall, 1),
            unit="s",
            ratio=round(ratio, 2),
            bar=f">= {BAR:g}x",
            met=ratio >= BAR,
            why="" if ratio >= BAR else why,
            commands={
                "ours": "UV_NO_INDEX=1 UV_FIND_LINKS=WHEELS inv stack.install",
                "other": "python3.10 -m venv ENV && ENV/bin/pip install --no-index --find-links "
                f"WHEELS --require-hashes -r configs/locks/{bench.flavour}.txt",
            },
            detail={
                "cpu": {"ours": round(ours.cpu, 1), "other": round(other.cpu, 1)},
                "walls": {side: [round(one.wall, 1) for one in found[side]] for side in found},
                "bytecode files": bench.compiled,
            },
        )
    ]


class _Bench:
    def __init__(self, work: Path, lock: Path | None = None) -> None:
        project = Project.at(ROOT)
        chosen = project.stack.flavour(None)
        self._work, self._log = work, work / "log"
        self._wheels, self._pip = work / "wheels", work / "pip"
        self._tools = project.stack.build_constraints
        self._python = find_python(project.stack.python)
        self._lock = lock or chosen.lock
        self.flavour = chosen.name
        self.installed: dict[str, str] = {}
        self.compiled: dict[str, int] = {}

    def fetch(self) -> None:
        """Download the lock's files, and what builds the packages that have no wheel."""
        if self._python is None:
            raise CommandFailed("no Python 3.10 found; name one in TUNESMITH_PYTHON")
        argv = [self._python, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        argv += ["--dest", str(self._wheels), "--no-cache-dir"]
        for file in (self._tools, self._lock):
            measure([*argv, "-r", file], self._log, env=self._env())

    def ours(self, number: int) -> Measured:
        """Install as `inv stack.install` does."""
        home = self._work / "home"
        shutil.rmtree(home, ignore_errors=True)
        env = self._env(
            TUNESMITH_HOME=str(home),
            UV_CACHE_DIR=str(self._work / "uv"),
            UV_NO_INDEX="1",
            UV_FIND_LINKS=str(self._wheels),
        )
        argv = [Path(sys.executable).with_name("inv"), "stack.install"]
        took = measure(argv, self._log, env=env, cwd=ROOT)
        self._look("ours", home / "envs" / self.flavour)
        self._start(home / "envs" / self.flavour)
        shutil.rmtree(home)
        return took

    def theirs(self, number: int) -> Measured:
        """Install with pip into a venv."""
        shutil.rmtree(self._pip, ignore_errors=True)
        env = self._env(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_CONFIG_FILE="/dev/null")
        made = measure([str(self._python), "-m", "venv", self._pip], self._log, env=env)
        argv = [self._pip / "bin" / "pip", "install", "--quiet", "--no-index"]
        argv += ["--find-links", self._wheels, "--require-hashes", "-r", self._lock]
        took = measure(argv, self._log, env=env)
        self._look("other", self._pip)
        shutil.rmtree(self._pip)
        return Measured(made.wall + took.wall, made.cpu + took.cpu, took.peak)

    def _look(self, side: str, environment: Path) -> None:
        argv = [environment / "bin" / "python", "-c", PROBE]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        found: Mapping[str, str] = json.loads(done.stdout)
        rest = {name: version for name, version in found.items() if name not in _TOOLS}
        self.installed[side] = json.dumps(rest, sort_keys=True)
        self.compiled[side] = sum(1 for _ in environment.rglob("*.pyc"))

    def _start(self, environment: Path) -> None:
        """Raise CommandFailed when a start of LLaMA-Factory has to make bytecode."""
        before = set(environment.rglob("*.pyc"))
        measure([environment / "bin" / "llamafactory-cli", "version"], self._log, env=self._env())
        if made := set(environment.rglob("*.pyc")) - before:
            raise CommandFailed(f"{len(made)} modules had no bytecode, {min(made)} for one")

    def _env(self, **changes: str) -> dict[str, str]:
        scratch = self._work / "scratch"
        scratch.mkdir(exist_ok=True)
        return plain_env(TMPDIR=str(scratch), **changes)
