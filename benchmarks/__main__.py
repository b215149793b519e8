"""`make bench`, `make bench ONLY=merge`: run benchmarks, keep their figures in results.json.

`python -m benchmarks --take FILE` puts in what was measured on another machine.

A benchmark is a module here with `run(work, say) -> list[Result]`: `work` is an empty folder
for it, `say` prints a line. Results of benchmarks that did not run now stay as they were; each
row says when and with which versions it was measured.
"""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import render
from benchmarks.harness import ROOT, CommandFailed, Result
from tunesmith.core.files import write_json
from tunesmith.job.system.resources import cpu_count, memory_limit
from tunesmith.project import Project

RESULTS = ROOT / "benchmarks" / "results.json"
# In the order of running; what needs Docker and root comes last.
BENCHMARKS = (
    "doors",
    "start",
    "merge",
    "prepare",
    "check",
    "throughput",
    "install",
    "image",
    "provision",
    "cold",
    "end_to_end",
)


def main(asked: list[str]) -> int:
    """Run the benchmarks asked for, or all; return 1 if one could not be measured."""
    if asked[:1] == ["--take"]:
        taken = json.loads(Path(asked[1]).read_text(encoding="utf-8"))
        keep([Result(**row) for row in taken["results"]], taken["machine"], taken["versions"])
        render.main(RESULTS)
        return 0
    unknown = sorted(set(asked) - set(BENCHMARKS))
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = 0
    # Beside the training environment: the same disk, and room for models.
    parent = ROOT / ".tunesmith"
    parent.mkdir(exist_ok=True)
    for name in asked or BENCHMARKS:
        say(f"{name}")
        module = importlib.import_module(f"benchmarks.{name}")
        with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as work:
            try:
                results = module.run(Path(work), say)
            except (CommandFailed, OSError, subprocess.SubprocessError) as error:
                print(f"{name}: not measured: {error}", file=sys.stderr)
                failed = 1
                continue
        keep(results)
        # After each: what was measured is told, whatever becomes of the next.
        render.main(RESULTS)
        for result in results:
            say(line_of(result))
    return failed


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def line_of(result: Result) -> str:
    """Return a result as one line."""
    other = "" if result.other is None else f" against {result.other:g}"
    ratio = "" if result.ratio is None else f", ratio {result.ratio:.2f}"
    verdict = "met" if result.met else "NOT met"
    return f"{result.id}: {result.ours:g}{other} {result.unit}{ratio}; bar {result.bar}: {verdict}"


def keep(
    results: list[Result], where: str | None = None, by: Mapping[str, Any] | None = None
) -> None:
    """Put results into results.json in place of older ones with the same id.

    `where` and `by` are machine and versions of results measured elsewhere.
    """
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    rows = {row["id"]: row for row in known.get("results", [])}
    for result in results:
        rows[result.id] = {
            **asdict(result),
            "date": date.today().isoformat(),
            "machine": where or machine(),
            "versions": by or versions(),
        }
    write_json(
        RESULTS,
        {
            "machine": machine(),
            "versions": versions(),
            "date": date.today().isoformat(),
            "results": [rows[key] for key in sorted(rows)],
        },
    )


def machine() -> str:
    """Return what this machine is, in words that name no person and no place."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    memory = memory_limit() / 2**30
    return f"{cpu_count()} x {models[0] if models else platform.machine()}, {memory:.0f} GiB"


def versions() -> Mapping[str, Any]:
    """Return the versions that matter, of the training environment and of this one."""
    python = Project.at(ROOT).environment().python
    code = (
        "import json, platform; from importlib.metadata import version as v; "
        "print(json.dumps({'python': platform.python_version(), "
        "**{n: v(n) for n in ('torch', 'transformers', 'peft', 'llamafactory')}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"control python": platform.python_version(), **found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
