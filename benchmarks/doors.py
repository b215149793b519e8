"""How long a person waits for an answer that needs no work: the list, the runs, a plan.

Nothing is compared: the bar is a time. The gate: no torch and nothing else of the training half
is loaded, asked of the process itself at its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, CommandFailed, Measured, Result, measure, middle, plain_env
from unit.run_folder import build_run

RUNS = 20
TIMES = 7
HEAVY = ("torch", "transformers", "llamafactory", "ansible", "docker", "matplotlib", "numpy")

# What `inv` does, and then which of the modules in question are loaded.
PROBE = """
import json, sys
from invoke.main import program
heavy, *words = sys.argv[1:]
try:
    program.run(["inv", *words])
except SystemExit as end:
    if end.code:
        raise
print(json.dumps([name for name in json.loads(heavy) if name in sys.modules]))
"""


def run(work: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure the doors, each several times in turn."""
    env = plain_env(TUNESMITH_HOME=str(work / "home"))
    for number in range(RUNS):
        made = build_run(work / "made")
        made.rename(_folder(work) / f"20260114-0930{number:02}-smollm2_135m_lora_sft")
    doors = {
        "doors-list": (("--list",), 0.5, "`inv --list`"),
        "doors-runs": (("runs",), 1.0, f"`inv runs` with {RUNS} runs"),
        "doors-dry": (("--dry", "train"), 0.3, "`inv --dry train`: data checked, plan shown"),
        "doors-help": (("train", "--help"), 0.3, "the help of one verb"),
    }
    for words, _, _ in doors.values():
        _loads_nothing_heavy(words, work, env)
    inv = Path(sys.executable).with_name("inv")
    found: dict[str, list[Measured]] = {name: [] for name in doors}
    # By turns; the first of each warms the files and is not counted.
    for turn in range(TIMES + 1):
        for name, (words, _, _) in doors.items():
            one = measure([inv, *words], work / "log", env=env, cwd=ROOT)
            if turn:
                found[name].append(one)
    results = []
    for name, (words, bar, what) in doors.items():
        took = middle(found[name])
        say(f"  {name}: {took.wall:.3f} s")
        results.append(
            Result(
                id=name,
                what=what,
                ours=round(took.wall, 3),
                other=None,
                unit="s",
                ratio=None,
                bar=f"<= {bar:g} s",
                met=took.wall <= bar,
                why=""
                if took.wall <= bar
                else f"it takes {took.cpu:.2f} s of a processor, most of it for imports; the rest "
                "is waiting for one, on a machine that had other work",
                commands={"ours": f"inv {' '.join(words)}"},
                detail={
                    "cpu": round(took.cpu, 3),
                    "slowest": round(max(one.wall for one in found[name]), 3),
                    "times": TIMES,
                },
            )
        )
    return results


def _folder(work: Path) -> Path:
    runs = work / "home" / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    return runs


def _loads_nothing_heavy(words: tuple[str, ...], work: Path, env: dict[str, str]) -> None:
    log = work / "probe.log"
    measure([sys.executable, "-c", PROBE, json.dumps(HEAVY), *words], log, env=env, cwd=ROOT)
    loaded = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    if loaded:
        raise CommandFailed(f"inv {' '.join(words)} loads {', '.join(loaded)}")
