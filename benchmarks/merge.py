"""The merge by blocks against `llamafactory-cli export`, `cp`, and itself on a larger model.

The gate of every comparison: both sides' weights have the same sha256. Models have a real shape
and random weights, are made here and deleted again. Two things are measured of ours: the weights
alone, which is what took the export its memory and time, and the whole phase as a run has it. The
phase does more than the export: it hashes base and result, has LLaMA-Factory write everything
around the weights and compare the prompts (a process beside it), and brings all to disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

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
from benchmarks.random_model import LARGE, SMALL, Shape, write_adapter, write_base
from tunesmith.core import isolated
from tunesmith.core.files import sha256_of
from tunesmith.job.merge import bundle
from tunesmith.job.merge.phase import parameter_count
from tunesmith.job.merge.tensors import stored_below
from tunesmith.job.run import manifest as run_manifest
from tunesmith.job.run.folder import RunFolder
from tunesmith.project import Project

WEIGHTS = "model.safetensors"
DEMO = "HuggingFaceTB--SmolLM2-135M-Instruct@*"
ROOM = 36_000_000_000  # bytes free for the 7B comparison: base, result and what the disk keeps
# The weights alone, as job/merge/phase.py calls it.
OURS = """
import sys
from pathlib import Path
from tunesmith.job.merge import matmul, pool, streaming
from tunesmith.job.merge.adapter import check_fits
base, adapter, out = map(Path, sys.argv[1:])
shards = streaming.predicted_files(base, "BF16", float(999))
out.mkdir()
streaming.merge(base, check_fits(base, adapter), shards, out, matmul.best(), pool.fitting())
"""
INNER = (
    "python -c 'streaming.merge(base, check_fits(base, adapter), shards, out, matmul.best(), "
    "pool.fitting())'"
)
# What the end of a training does, in a process that has loaded what a training loads.
BUNDLE = """
import json, resource, sys, time
from pathlib import Path
from tunesmith.job.merge import bundle
from tunesmith.job.patches import imports
from tunesmith.job.system import resources
from tunesmith.job.run.folder import RunFolder
imports.trim()
with imports.only("sft", scores=False):
    from llamafactory.train import tuner
import tunesmith.job.training.callback
run = RunFolder(Path(sys.argv[1]))
made = []
def make():
    fail = lambda *_, **fields: sys.exit(str(fields))
    made.append(bundle.after_training(run.path, run.request(), fail))
before = time.process_time()
grown = resources.growth_during(make)
cpu = time.process_time() - before
Path(sys.argv[2]).write_text(json.dumps({"wall": made[0], "cpu": cpu, "bytes": grown}))
"""
HASH = """
import sys
from pathlib import Path
from tunesmith.core.files import sha256_of
[sha256_of(Path(file)) for file in sys.argv[1:]]
"""
EXPORT = "llamafactory-cli export export.yaml  # infer_dtype: bfloat16, export_device: cpu"
PHASE = "python -m tunesmith.job.supervisor.worker RUN merge"


def run(work: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure all comparisons."""
    python = Project.at(ROOT).environment().python
    shapes: list[_Shape] = []
    results = _demo(work / "135m", python, shapes, say)
    bench = _Bench(work / "1.5b", python)
    bench.make(SMALL)
    say("A llamafactory-cli export, W our weights, P our phase, N our phase without a bundle, C cp")
    say(f"  bundle: {bench.bundle['wall']:.2f} s wall, {bench.bundle['bytes'] / 1e6:.0f} MB more")
    sides = {"A": bench.export, "W": bench.weights, "P": bench.phase}
    sides |= {"N": bench.phase_alone, "C": bench.copy}
    found = interleave(sides, "AWPNCAWPNCAWPNC", say)
    shapes.append(_Shape(bench.numbers, found))
    results += _against_export("merge-1.5b", "merge of the weights, 1.5B shape", found, "W", INNER)
    results += _phase(bench, found, say)
    results.append(_against_copy(found))
    results.append(_bytes(bench, say))
    shutil.rmtree(work / "1.5b")
    results += _flat(work / "7b", python, shapes, say)
    return [
        replace(one, detail={**one.detail, "plots": _plots(shapes)})
        if one.id == "merge-1.5b-phase"
        else one
        for one in results
    ]


@dataclass(frozen=True)
class _Shape:
    """What was measured of one size of model: numbers in its tensors, and each side's turns."""

    numbers: int
    found: Mapping[str, Sequence[Measured]]


def _plots(shapes: Sequence[_Shape]) -> list[dict[str, Any]]:
    names = {"P": "our phase", "W": "our weights", "A": "llamafactory-cli export"}
    figures: tuple[tuple[str, str, Callable[[Measured], float]], ...] = (
        ("Merge: wall time by size of the model", "seconds", lambda one: one.wall),
        ("Merge: peak memory by size of the model", "MB", lambda one: one.peak / 1e6),
    )
    return [
        {
            "title": title,
            "x": "parameters",
            "y": unit,
            "log_x": True,
            "log_y": True,
            "lines": {
                name: [
                    [shape.numbers, round(value(middle(shape.found[side])), 2)]
                    for shape in shapes
                    if side in shape.found
                ]
                for side, name in names.items()
            },
        }
        for title, unit, value in figures
    ]


class _Bench:
    """A run folder with a random model and adapter, and the sides that merge it."""

    def __init__(self, work: Path, python: Path) -> None:
        self.work, self.python = work, python
        self.base, self.run = work / "base", work / "run"
        self.adapter = self.run / "output"
        self.adapter_bytes = 0
        self._log = work / "log"
        self._hashes: set[str] = set()
        self.bundle: dict[str, float] = {}
        self.numbers = 0

    def make(self, shape: Shape, **merge: Any) -> None:
        """Write base and adapter, a tokenizer, and the run; `merge`: its export keys."""
        self.work.mkdir()
        tiny = self.work / "tiny"
        script = ROOT / "tests" / "standins" / "tiny_r1.py"
        measure([self.python, script, tiny], self._log, env=plain_env())
        write_base(self.base, shape)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(tiny / name, self.base / name)
        self.adapter_bytes = write_adapter(self.adapter, shape, self.base)
        self.prepare("deepseekr1", merge, enable_thinking=False)

    def prepare(self, template: str, merge: Mapping[str, Any], **extra: Any) -> None:
        """Write the run's files, as a training leaves them."""
        self.template = {"template": template, **extra}
        rows = [{"instruction": f"Question {n}?", "output": f"{n}."} for n in range(9)]
        (self.work / "rows.json").write_text(json.dumps(rows))
        columns = {"prompt": "instruction", "response": "output"}
        info = {"rows": {"file_name": "rows.json", "columns": columns}}
        (self.work / "dataset_info.json").write_text(json.dumps(info))
        config = {
            "model_name_or_path": str(self.base),
            "output_dir": str(self.adapter),
            "stage": "sft",
            "finetuning_type": "lora",
            "dataset": "rows",
            "dataset_dir": str(self.work),
            **self.template,
        }
        (self.run / "config.yaml").write_text(yaml.safe_dump(config))
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)}
            for file in self.base.iterdir()
        }
        request = {
            "run_id": "run",
            "model": {"name": "random", "files": files},
            "merge": dict(merge),
        }
        (self.run / "run.json").write_text(json.dumps(request))
        self.numbers = parameter_count(self.base)
        report = self.work / "bundle.json"
        self._do([self.python, "-c", BUNDLE, self.run, report])
        self.bundle = json.loads(report.read_text())

    def _do(self, argv: Sequence[str | Path]) -> Measured:
        return measure(argv, self._log, env=plain_env())

    def export(self, _turn: int) -> Measured:
        """The other side."""
        out = self.work / "exported"
        config = {
            "model_name_or_path": str(self.base),
            "adapter_name_or_path": str(self.adapter),
            "finetuning_type": "lora",
            "export_dir": str(out),
            "export_size": 5,
            "export_device": "cpu",
            "infer_dtype": "bfloat16",
            **self.template,
        }
        (self.work / "export.yaml").write_text(yaml.safe_dump(config))
        program = self.python.with_name("llamafactory-cli")
        return self._timed([program, "export", self.work / "export.yaml"], out)

    def weights(self, _turn: int) -> Measured:
        """Ours, the weights alone."""
        out = self.work / "weights"
        return self._timed([self.python, "-c", OURS, self.base, self.adapter, out], out)

    def phase(self, _turn: int) -> Measured:
        """Ours, as a run has it after its training."""
        return self._timed(self.phase_argv, self.run / "merged")

    def phase_alone(self, _turn: int) -> Measured:
        """Ours, where the training made no bundle: LLaMA-Factory is started beside the merge."""
        aside = self.work / "aside"
        (self.run / bundle.FOLDER).rename(aside)
        try:
            return self._timed(self.phase_argv, self.run / "merged")
        finally:
            aside.rename(self.run / bundle.FOLDER)

    @property
    def phase_argv(self) -> list[str | Path]:
        """The command of the phase."""
        return [
            *isolated.argv(self.python, "tunesmith.job.supervisor.worker", str(self.run), "merge")
        ]

    def held(self) -> int:
        """Return the most bytes that all processes of a phase held together (their PSS)."""
        with self._log.open("wb") as log:
            child = subprocess.Popen(
                [str(word) for word in self.phase_argv], stdout=log, stderr=log, env=plain_env()
            )
            most = 0
            while child.poll() is None:
                most = max(most, _proportional(child.pid))
                time.sleep(0.05)
        if child.returncode:
            raise CommandFailed(self._log.read_text(errors="replace")[-3000:])
        shutil.rmtree(self.run / "merged")
        return most

    def hashing(self) -> Measured:
        """Reading and hashing base and result, which the phase does besides."""
        return self._do([self.python, "-c", HASH, *[self.base / WEIGHTS] * 2])

    def copy(self, _turn: int) -> Measured:
        """The floor: the same bytes, unchanged."""
        out = self.work / "copy"
        out.mkdir()
        os.sync()
        found = measure(["cp", self.base / WEIGHTS, out / WEIGHTS], self._log)
        shutil.rmtree(out)
        return found

    def _timed(self, argv: Sequence[str | Path], out: Path) -> Measured:
        os.sync()  # no side waits for what another has left to write
        found = measure(argv, self._log, env=plain_env())
        self._hashes.add(sha256_of(out / WEIGHTS))
        shutil.rmtree(out)
        if len(self._hashes) > 1:
            raise CommandFailed(f"{argv[0]}: weights differ between the sides")
        return found

    @property
    def sha256(self) -> str:
        """Of the weights of every side so far."""
        return next(iter(self._hashes))


def _proportional(pid: int) -> int:
    """Return the bytes a process and its children hold, shared pages divided among them."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has just ended
    line = next((line for line in rollup.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024 + sum(_proportional(int(child)) for child in children)


def _demo(
    work: Path, python: Path, shapes: list[_Shape], say: Callable[[str], None]
) -> list[Result]:
    models = Project.at(ROOT).models
    base = next(iter(sorted(models.glob(DEMO))), None)
    if base is None:
        say("merge-135m: skipped: no SmolLM2 in the store; `make demo` fetches it")
        return []
    bench = _Bench(work, python)
    bench.base = base
    work.mkdir()
    bench.run.mkdir()
    code = (
        "import sys, torch; from peft import LoraConfig, get_peft_model; "
        "from transformers import AutoModelForCausalLM as M; "
        "m = M.from_pretrained(sys.argv[1], torch_dtype=torch.float32); torch.manual_seed(3); "
        "a = get_peft_model(m, LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear')); "
        "[w.data.normal_(std=0.02) for n, w in a.named_parameters() if 'lora_B' in n]; "
        "a.save_pretrained(sys.argv[2])"
    )
    measure([python, "-c", code, base, bench.adapter], work / "log", env=plain_env())
    bench.prepare("smollm", {})
    say("135M: A is llamafactory-cli export, W our weights, P our phase")
    sides = {"A": bench.export, "W": bench.weights, "P": bench.phase}
    found = interleave(sides, "AWPAWPAWP", say)
    shapes.append(_Shape(bench.numbers, found))
    shutil.rmtree(work)
    return _against_export("merge-135m", "merge of the weights, SmolLM2-135M", found, "W", INNER)[
        :1
    ]


def _against_export(
    name: str,
    what: str,
    found: Mapping[str, Sequence[Measured]],
    side: str,
    command: str,
    more: str = "see the turns",
    detail: Mapping[str, Any] | None = None,
) -> list[Result]:
    ours, other = middle(found[side]), middle(found["A"])
    memory = "peak memory of the largest process"
    figures = (
        ("", "wall time", ours.wall, other.wall, "s", 3.0),
        ("-cpu", "CPU time", ours.cpu, other.cpu, "s", 4.0),
        ("-memory", memory, ours.peak / 1e6, other.peak / 1e6, "MB", 9.0),
    )
    results = []
    for end, figure, one, two, unit, bar in figures:
        ratio = two / one
        met = ratio >= bar
        results.append(
            Result(
                id=name + end,
                what=f"{what}: {figure}; same sha256",
                ours=round(one, 2),
                other=round(two, 2),
                unit=unit,
                ratio=round(ratio, 2),
                bar=f">= {bar:g}x",
                met=met,
                why="" if met else more,
                commands={"ours": command, "other": EXPORT},
                detail={
                    "turns": {
                        key: [[round(m.wall, 2), round(m.cpu, 2), m.peak] for m in found[key]]
                        for key in found
                    },
                    "turns are": "wall s, CPU s, peak bytes",
                    **(detail or {}),
                },
            )
        )
    return results


def _phase(
    bench: _Bench, found: Mapping[str, Sequence[Measured]], say: Callable[[str], None]
) -> list[Result]:
    """Compare the whole phase, as a run has it after its training."""
    hashing, alone, held = bench.hashing(), middle(found["N"]), bench.held()
    say(f"  hashing: {hashing.wall:.2f} s wall, {hashing.cpu:.2f} s cpu; all {held / 1e6:.0f} MB")
    spent = bench.bundle
    what = (
        "merge, the whole phase after a training, 1.5B shape (time added to the training: "
        f"{spent['wall']:.1f} s)"
    )
    why = (
        f"of its {middle(found['P']).cpu:.1f} s, {hashing.cpu:.1f} s hash base and result, which "
        "the export does not do; most of the rest is kernel time for reading and writing"
    )
    detail = {
        "added to the training": {
            "wall s": round(spent["wall"], 2),
            "CPU s": round(spent["cpu"], 2),
            "additional MB": round(spent["bytes"] / 1e6, 1),
        },
        "without a bundle (LLaMA-Factory started in parallel)": {
            "wall s": round(alone.wall, 2),
            "CPU s": round(alone.cpu, 2),
            "peak MB": round(alone.peak / 1e6, 1),
        },
        "hashing base and result alone, wall and CPU s": [
            round(hashing.wall, 2),
            round(hashing.cpu, 2),
        ],
        "all processes of the phase together, PSS in MB": round(held / 1e6, 1),
    }
    return _against_export("merge-1.5b-phase", what, found, "P", PHASE, why, detail)


def _against_copy(found: Mapping[str, Sequence[Measured]]) -> Result:
    ours, other = middle(found["W"]), middle(found["C"])
    ratio = ours.wall / other.wall
    return Result(
        id="merge-cp",
        what="merge of the weights, 1.5B shape, compared with copying the file: wall time",
        ours=round(ours.wall, 2),
        other=round(other.wall, 2),
        unit="s",
        ratio=round(ratio, 2),
        bar="<= 1.5x of cp",
        met=ratio <= 1.5,
        why=""
        if ratio <= 1.5
        else f"{ours.cpu:.1f} s of CPU time on two cores, where cp takes {other.cpu:.1f}: "
        "a third is kernel time, which cp needs too, a tenth is spent starting Python and "
        "loading PyTorch's library, the rest converting, multiplying, adding and rounding, "
        "limited by memory bandwidth; a slow disk hides the difference",
        commands={"ours": INNER, "other": "cp base/model.safetensors out/"},
    )


def _bytes(bench: _Bench, say: Callable[[str], None]) -> Result:
    """Bring back the adapter and merge at the destination, without PyTorch."""
    log = bench.work / "log"
    items = run_manifest.items_of(RunFolder(bench.run))
    brought = sum(item.path.stat().st_size for item in items if item.part in ("adapter", "record"))
    argv = isolated.argv(sys.executable, "tunesmith.job.merge.offline", str(bench.run))
    found = measure(argv, log, env=plain_env())
    merged = bench.run / "merged"
    whole = sum(file.stat().st_size for file in merged.iterdir())
    same = sha256_of(merged / WEIGHTS) == bench.sha256
    say(f"  numpy: {found.wall:.2f} s wall, {found.cpu:.2f} s cpu, {found.peak / 1e6:.0f} MB")
    numbers = sum(tensor.size // 2 for tensor in stored_below(merged).values())
    out = bench.work / "exact"
    measure([bench.python, "-c", OURS, bench.base, bench.adapter, out], log, env=plain_env())
    off = 0 if same else _differing(merged / WEIGHTS, out / WEIGHTS)
    ratio = whole / bench.adapter_bytes
    return Result(
        id="result-bytes",
        what="the merged model on the user's disk: adapter downloaded, merged there without "
        "PyTorch",
        ours=round(bench.adapter_bytes / 1e6, 1),
        other=round(whole / 1e6, 1),
        unit="MB",
        ratio=round(ratio, 1),
        bar=">= 90x fewer bytes, < 100 MB of memory, same sha256 with torch",
        met=ratio >= 90 and found.peak < 100e6,
        commands={
            "ours": "inv pull --on HOST --run RUN --merge-here",
            "other": "inv pull --on HOST --run RUN  # after inv merge --on HOST",
        },
        detail={
            "all downloaded files, MB": round(brought / 1e6, 1),
            "peak memory of the merge without torch, MB": round(found.peak / 1e6, 1),
            "its wall and CPU seconds": [round(found.wall, 2), round(found.cpu, 2)],
            "elements rounded differently without torch": off,
            "elements": numbers,
            "same sha256 without torch": same,
            "seconds at 100 Mbit/s": {
                "ours": round(brought * 8 / 100e6, 1),
                "other": round(whole * 8 / 100e6, 1),
            },
        },
    )


def _differing(one: Path, two: Path) -> int:
    import numpy as np

    first, second = (np.memmap(file, np.uint16, "r") for file in (one, two))
    step = 1 << 22
    return sum(
        int((first[at : at + step] != second[at : at + step]).sum())
        for at in range(0, len(first), step)
    )


def _flat(
    work: Path, python: Path, shapes: list[_Shape], say: Callable[[str], None]
) -> list[Result]:
    """Measure ours on a 7B shape. The export of one takes 15 GB of memory: it is left out."""
    free = shutil.disk_usage(work.parent).free
    if free < ROOM:
        say(f"merge-7b-memory: skipped: {free / 1e9:.0f} GB free, {ROOM / 1e9:.0f} GB needed")
        return []
    bench = _Bench(work, python)
    bench.make(LARGE, export_size=99)  # one file, as the weights alone
    found = interleave({"W": bench.weights, "P": bench.phase}, "WP", say)
    shutil.rmtree(work)
    before = shapes[-1].found
    shapes.append(_Shape(bench.numbers, found))
    one, small = middle(found["W"]), middle(before["W"])
    phase, phase_small = middle(found["P"]), middle(before["P"])
    ratio = one.peak / small.peak
    return [
        Result(
            id="merge-7b-memory",
            what="merge of the weights, 7B shape: peak memory compared with the 1.5B shape",
            ours=round(one.peak / 1e6, 1),
            other=round(small.peak / 1e6, 1),
            unit="MB",
            ratio=round(ratio, 3),
            bar="within 10 %",
            met=abs(ratio - 1) <= 0.1,
            why="" if abs(ratio - 1) <= 0.1 else "see the turns",
            commands={"ours": INNER, "other": f"{INNER}  # 1.5B"},
            detail={
                "wall s": round(one.wall, 2),
                "CPU s": round(one.cpu, 2),
                "the phase": {
                    "wall s": round(phase.wall, 2),
                    "CPU s": round(phase.cpu, 2),
                    "peak MB, 7B and 1.5B": [
                        round(phase.peak / 1e6, 1),
                        round(phase_small.peak / 1e6, 1),
                    ],
                },
                "the export": "not measured at 7B: it needs more memory than the size of the model",
            },
        )
    ]
