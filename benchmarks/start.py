"""From the command to the first trained batch: our job against `llamafactory-cli train`.

Both train the same tiny random Qwen2 on the CPU with the same config, in the same environment,
for a few steps: all that is left to measure is the way to the first batch, seen when its loss
is written (events.jsonl here, trainer_log.jsonl there). Ours is the supervisor with its worker,
as an image's first process; `start` puts a session of its own around it, a tenth of a second.
The gate: both end with the same adapter, byte for byte.

Two comparisons. With bytecode: the environment as it is, for both. Without: as after `uv pip
install`, which compiles nothing, in an image that keeps nothing; ours has its bytecode there
too, since installer, playbook and image of this project compile. The standard library keeps its
bytecode on both sides.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

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
from tunesmith.core import isolated
from tunesmith.core.files import sha256_of, write_json
from tunesmith.job.run.folder import RunFolder
from tunesmith.project import Project

STEPS = 5
ROWS = 200
LOOK_SECONDS = 0.01
ADAPTER = "adapter_model.safetensors"


def run(work: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure both comparisons."""
    bench = _Bench(work, Project.at(ROOT).environment().python)
    bench.prepare()
    say("with bytecode: A is llamafactory-cli train, B is ours")
    warm = interleave({"A": bench.theirs, "B": bench.ours}, "BABABAB", say)
    # The first of ours has warmed the files for all that follow.
    warm["B"] = warm["B"][1:]
    say("without bytecode for A")
    bare = interleave({"A": bench.theirs_bare, "B": bench.ours}, "ABABA", say)
    bench.compare()
    return [
        _result(
            "start",
            "job start: command to first batch, bytecode present on both sides",
            warm,
            1.5,
            "llamafactory-cli train config.yaml",
        ),
        _result(
            "start-bare",
            "job start without bytecode of packages (uv pip install, bytecode not kept): "
            "LLaMA-Factory compiles at every start, ours was compiled at installation",
            bare,
            3.0,
            "PYTHONDONTWRITEBYTECODE=1 PYTHONPYCACHEPREFIX=DIR llamafactory-cli train config.yaml"
            "  # DIR holds the bytecode of the standard library only",
        ),
    ]


def _result(
    name: str, what: str, found: Mapping[str, Sequence[Measured]], bar: float, theirs: str
) -> Result:
    ours, other = middle(found["B"]), middle(found["A"])
    ratio = other.wall / ours.wall
    return Result(
        id=name,
        what=what,
        ours=round(ours.wall, 2),
        other=round(other.wall, 2),
        unit="s",
        ratio=round(ratio, 2),
        bar=f">= {bar:g}x",
        met=ratio >= bar,
        why="" if ratio >= bar else "what is left is torch, transformers and peft themselves",
        commands={"ours": "python -m tunesmith.job run RUN train", "other": theirs},
        detail={
            "cpu": {"ours": round(ours.cpu, 2), "other": round(other.cpu, 2)},
            "note": "CPU seconds cover the whole job, including its exit",
            "walls": {side: [round(one.wall, 2) for one in found[side]] for side in found},
        },
    )


class _Bench:
    def __init__(self, work: Path, python: Path) -> None:
        self._work, self._python = work, python
        self._log = work / "log"
        self._adapters: set[str] = set()

    def prepare(self) -> None:
        """Make model and data, and the cache that holds the standard library's bytecode."""
        data = self._work / "data"
        data.mkdir()
        rows.make(data / "rows.jsonl", ROWS, words=30)
        rows.register(data, "rows.jsonl")
        script = ROOT / "tests" / "standins" / "tiny_r1.py"
        measure([self._python, script, self._work / "model"], self._log, env=plain_env())
        code = "import sysconfig; print(sysconfig.get_path('stdlib'))"
        done = subprocess.run(
            [self._python, "-c", code], capture_output=True, text=True, check=True
        )
        self._cache = self._work / "bytecode"
        _link_bytecode(Path(done.stdout.strip()), self._cache)

    def ours(self, number: int) -> Measured:
        """Train as a run of ours."""
        run = RunFolder(self._work / "runs" / f"ours-{number}-{time.monotonic_ns()}")
        run.path.mkdir(parents=True)
        run.config_file.write_text(yaml.safe_dump(self._config(run.output)), encoding="utf-8")
        data = [{"key": "rows", "rows": ROWS}]
        request = {"run_id": run.run_id, "phases": ["train"], "data": data, "limits": {}}
        write_json(run.request_file, request | {"env": {}})
        argv = isolated.argv(self._python, "tunesmith.job", "run", str(run.path), "train")
        return self._first_batch(argv, run.events_file, b'"event": "log"', run.output)

    def theirs(self, number: int, env: Mapping[str, str] | None = None) -> Measured:
        """Train as the config's author would."""
        folder = self._work / "runs" / f"theirs-{number}-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        config, output = folder / "config.yaml", folder / "output"
        config.write_text(yaml.safe_dump(self._config(output)), encoding="utf-8")
        argv = [self._python.with_name("llamafactory-cli"), "train", config]
        return self._first_batch(argv, output / "trainer_log.jsonl", b'"loss"', output, env)

    def theirs_bare(self, number: int) -> Measured:
        """Train where no package has bytecode, and none may be kept."""
        bare = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(self._cache)}
        return self.theirs(number, bare)

    def compare(self) -> None:
        """Raise CommandFailed unless every training ended with the same adapter."""
        if len(self._adapters) != 1:
            raise CommandFailed(f"{len(self._adapters)} different adapters: no fair comparison")

    def _config(self, output: Path) -> dict[str, Any]:
        return {
            "model_name_or_path": str(self._work / "model"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_target": "all",
            "dataset": "rows",
            "dataset_dir": str(self._work / "data"),
            "template": "deepseekr1",
            "cutoff_len": 128,
            "overwrite_cache": True,
            "output_dir": str(output),
            "logging_steps": 1,
            "save_steps": 1000,
            "plot_loss": True,
            "report_to": "none",
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1.0e-4,
            "seed": 7,
        }

    def _first_batch(
        self,
        argv: Sequence[str | Path],
        file: Path,
        sign: bytes,
        output: Path,
        env: Mapping[str, str] | None = None,
    ) -> Measured:
        """Run a training to its end; `wall` is when `sign` stood in `file`."""
        home = {"HF_HOME": str(self._work / "huggingface")}
        variables = plain_env(**home, **(env or {}))
        with self._log.open("wb") as log:
            began = time.monotonic()
            child = subprocess.Popen(
                [str(word) for word in argv], stdout=log, stderr=subprocess.STDOUT, env=variables
            )
            first = None
            while first is None and os.waitid(os.P_PID, child.pid, _ENDED) is None:
                if file.exists() and sign in file.read_bytes():
                    first = time.monotonic() - began
                time.sleep(LOOK_SECONDS)
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or first is None:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise CommandFailed(
                f"{argv}: exit code {child.returncode}, first batch {first}\n{tail}"
            )
        self._adapters.add(sha256_of(output / ADAPTER))
        return Measured(first, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


# Look whether the child has ended, and leave it to wait4.
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _link_bytecode(library: Path, cache: Path) -> None:
    """Lay the bytecode of `library` out as PYTHONPYCACHEPREFIX wants it, by links."""
    for file in library.rglob("__pycache__/*.pyc"):
        if "site-packages" in file.parts or file.name.count(".") != 2:
            continue
        place = cache / file.parent.parent.relative_to("/")
        place.mkdir(parents=True, exist_ok=True)
        (place / file.name).symlink_to(file)
