"""The data check that `inv train` does, against finding out by LLaMA-Factory's preparation.

Who has no check loads the file and lets LLaMA-Factory prepare it: that is the other side, one
process for each CPU. It is measured once, on 100,000 rows; ours on the same rows before and
after, and then on 10,000 and 1,000,000 for its growth in time and memory. The gate: both sides
count the same rows and keep them all, and three rows broken on purpose are told by number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import rows
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
from tunesmith.job.system.resources import cpu_count
from tunesmith.plan import build
from tunesmith.project import Project

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZES = (10_000, 100_000, 1_000_000)
COMPARED = 100_000
RATIO, MEMORY = 20.0, 1e9

OURS = """
import json, sys
from pathlib import Path
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry

columns = {"prompt": "instruction", "query": "input", "response": "output"}
report = check_file(Path(sys.argv[1]), Entry("rows", columns=columns))
rows = [finding.row for finding in report.findings if finding.severity == "error"]
print(json.dumps({"rows": report.rows, "kept": report.kept, "errors": rows}))
"""
THEIRS = """
import json, sys

file, config = sys.argv[1], json.loads(sys.argv[2])
with open(file, encoding="utf-8") as stream:
    loaded = [json.loads(line) for line in stream]

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

model, data, training, _, _ = get_train_args(config)
module = load_tokenizer(model)
template = get_template_and_fix_tokenizer(module["tokenizer"], data)
found = get_dataset(template, model, data, training, stage="sft", **module)
print(json.dumps({"rows": len(loaded), "kept": len(found["train_dataset"])}))
"""


def run(work: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure the comparison, then ours at each size."""
    bench = _Bench(work)
    files = {count: bench.make(count) for count in SIZES}
    bench.finds_what_is_broken(files[SIZES[0]])
    say(f"{COMPARED} rows: A is json.loads and LLaMA-Factory's preparation, B is our check")
    found = interleave(
        {
            "A": lambda _: bench.theirs(files[COMPARED], COMPARED),
            "B": lambda _: bench.ours(files[COMPARED], COMPARED),
        },
        "BAB",
        say,
    )
    ours, other = middle(found["B"]), middle(found["A"])
    grown = {COMPARED: ours}
    for count in SIZES:
        if count != COMPARED:
            say(f"{count} rows: B")
            grown |= {count: interleave({"B": _once(bench, files[count], count)}, "B", say)["B"][0]}
    ratio, most = other.wall / ours.wall, grown[SIZES[-1]]
    return [
        Result(
            id="check",
            what=f"data check, {COMPARED:,} rows",
            ours=round(ours.wall, 2),
            other=round(other.wall, 1),
            unit="s",
            ratio=round(ratio, 1),
            bar=f">= {RATIO:g}x",
            met=ratio >= RATIO,
            why="" if ratio >= RATIO else "the check decodes JSON as the other side does",
            commands={
                "ours": "check_file() as called by `inv train`; OURS in benchmarks/check.py",
                "other": f"json.loads of each line and get_dataset() of LLaMA-Factory with "
                f"preprocessing_num_workers={cpu_count()}; THEIRS in benchmarks/check.py",
            },
            detail={"cpu": {"ours": round(ours.cpu, 2), "other": round(other.cpu, 1)}},
        ),
        Result(
            id="check-memory",
            what=f"peak memory of the data check, {SIZES[-1]:,} rows ({bench.size(files)})",
            ours=round(most.peak / 1e6),
            other=None,
            unit="MB",
            ratio=None,
            bar=f"<= {MEMORY / 1e6:.0f} MB",
            met=most.peak <= MEMORY,
            why="" if most.peak <= MEMORY else "too much is kept of each row",
            commands={"ours": "check_file() as called by `inv train`; OURS in benchmarks/check.py"},
            detail={
                "seconds": {f"{count:,} rows": round(one.wall, 2) for count, one in _sorted(grown)},
                "plots": [_plot(grown, "seconds"), _plot(grown, "MB")],
            },
        ),
    ]


def _once(bench: _Bench, file: Path, count: int) -> Callable[[int], Measured]:
    return lambda _: bench.ours(file, count)


def _sorted(grown: Mapping[int, Measured]) -> list[tuple[int, Measured]]:
    return sorted(grown.items())


def _plot(grown: Mapping[int, Measured], what: str) -> dict[str, Any]:
    of = {"seconds": lambda one: round(one.wall, 2), "MB": lambda one: round(one.peak / 1e6)}[what]
    word = {"seconds": "Time", "MB": "Peak memory"}[what]
    return {
        "title": f"{word} of the data check",
        "x": "rows",
        "y": what,
        "log_x": True,
        "log_y": what == "seconds",
        "lines": {"ours": [[count, of(one)] for count, one in _sorted(grown)]},
        **({"limit": MEMORY / 1e6} if what == "MB" else {}),
    }


class _Bench:
    def __init__(self, work: Path) -> None:
        project = Project.at(ROOT)
        self._work, self._log = work, work / "log"
        self._python = project.environment().python
        self._model = build.fetch_model(project, MODEL, lambda _: None).path

    def make(self, count: int) -> Path:
        """Make a file of so many rows, in a folder of its own."""
        folder = self._work / str(count)
        folder.mkdir()
        rows.make(folder / "rows.jsonl", count)
        rows.register(folder, "rows.jsonl")
        return folder / "rows.jsonl"

    def size(self, files: Mapping[int, Path]) -> str:
        """Return the largest file's size in words."""
        return f"{files[SIZES[-1]].stat().st_size / 1e6:.0f} MB"

    def ours(self, file: Path, count: int) -> Measured:
        """Check a file of sound rows."""
        took, report = self._check(file)
        if report != {"rows": count, "kept": count, "errors": []}:
            raise CommandFailed(f"{file}: our check says {report}")
        return took

    def theirs(self, file: Path, count: int) -> Measured:
        """Load and prepare the same file."""
        config = rows.config(self._model, file.parent, self._work / "output")
        config["preprocessing_num_workers"] = cpu_count()
        argv = [self._python, "-c", THEIRS, file, json.dumps(config)]
        env = plain_env(HF_HOME=str(self._work / "huggingface"))
        took = measure(argv, self._log, env=env, cwd=self._work)
        report = self._report()
        if report != {"rows": count, "kept": count}:
            raise CommandFailed(f"{file}: the other side says {report}")
        return took

    def finds_what_is_broken(self, file: Path) -> None:
        """Raise CommandFailed unless three broken rows are told by number."""
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, value in ((17, None), (501, 7), (9000, ["a", "b"])):
            lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | {"output": value})
        broken = self._work / "broken.jsonl"
        broken.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _, report = self._check(broken)
        if set(report["errors"]) != {17, 501, 9000}:
            raise CommandFailed(f"broken rows 17, 501, 9000: our check says {report}")

    def _check(self, file: Path) -> tuple[Measured, dict[str, Any]]:
        env = plain_env(PYTHONPATH=str(ROOT / "src"))
        took = measure([sys.executable, "-c", OURS, file], self._log, env=env)
        return took, self._report()

    def _report(self) -> dict[str, Any]:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        found: dict[str, Any] = json.loads(lines[-1])
        return found
