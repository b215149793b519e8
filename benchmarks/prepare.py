"""Data preparation: rows of text to token ids, as a run of ours and as LLaMA-Factory's examples.

Both call LLaMA-Factory's own `get_dataset` in a process of its own; the time is that call's,
imports not counted, and ours includes hashing the data and what the job runner decides (workers
for CPUs and rows, data found again by content). Theirs has the examples' settings:
`preprocessing_num_workers: 16`, `overwrite_cache: true`. The gate: both give the same ids,
labels and masks, compared by a hash over all rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
from tunesmith.plan import build
from tunesmith.project import Project

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FEW, MANY = 1_000, 100_000
WORDS = 40  # some 150 tokens a row, as chat data has
EXAMPLES = {"preprocessing_num_workers": 16, "overwrite_cache": True}
LOAD_SECONDS = 0.5

# argv: config, rows, "ours" or "theirs", result
PROBE = """
import hashlib, json, sys, time
from pathlib import Path

config, rows, side, result = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

import llamafactory.data.loader as loader
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from tunesmith.job.training import dataset_cache, phase as training_phase

def prepare(config):
    model, data, training, _, _ = get_train_args(config)
    module = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data)
    return lambda: loader.get_dataset(template, model, data, training, stage="sft", **module)

prepare(dict(config))  # what is imported and read only once is not what is measured
began = time.monotonic()
if side == "ours":
    training_phase.fit(config, {"data": [{"rows": rows}]}, lambda *_, **__: None)
    dataset_cache.hasten(config)
decided = time.monotonic() - began
work = prepare(config)
began = time.monotonic()
found = work()["train_dataset"]
seconds = decided + time.monotonic() - began
digests = []
for name in ("input_ids", "labels", "attention_mask"):
    ids, lengths = hashlib.sha256(), hashlib.sha256()
    for chunk in found.data.column(name).chunks:  # of which there are as many as processes
        ids.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("int64").tobytes())
        lengths.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
    digests += [ids.hexdigest(), lengths.hexdigest()]
Path(result).write_text(json.dumps(
    {"seconds": seconds, "rows": len(found), "digest": " ".join(digests),
     "workers": config.get("preprocessing_num_workers") or 1}))
"""


def run(work: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure few rows and many, each cold and once more."""
    bench = _Bench(work)
    results = []
    for count, turns, bar in ((FEW, "ABABA", 10.0), (MANY, "ABABA", 2.0)):
        name = f"{count // 1000}k"
        say(f"{count} rows: A is LLaMA-Factory with its examples' settings, B is ours, cold")
        data = bench.make(name, count)
        cold = interleave(
            {
                "A": lambda n, data=data: bench.once("A", data, n),
                "B": lambda n, data=data: bench.once("B", data, n),
            },
            turns,
            say,
        )
        say(f"{count} rows, once more")
        again = interleave(
            {
                "A": lambda _, data=data: bench.once("A", data, 0),
                "B": lambda _, data=data: bench.once("B", data, 0),
            },
            "B" if count == MANY else "BABAB",
            say,
        )
        # Theirs prepares anew each time: many rows are not prepared twice to show it.
        again["A"] = again["A"] or cold["A"]
        bench.compare()
        results += [_cold(name, count, bar, cold, bench), _again(name, count, cold, again)]
    return results


def _cold(
    name: str,
    count: int,
    bar: float,
    found: Mapping[str, Sequence[Measured]],
    bench: _Bench,
) -> Result:
    ours, other = middle(found["B"]), middle(found["A"])
    ratio = other.wall / ours.wall
    why = (
        "the tokenizer itself is what is left, and both use all CPUs for it: 16 processes on few "
        "CPUs cost their start and their memory, a fixed sum that many rows make small"
    )
    return Result(
        id=f"prepare-{name}",
        what=f"data preparation, {count:,} rows, cold",
        ours=round(ours.wall, 2),
        other=round(other.wall, 2),
        unit="s",
        ratio=round(ratio, 2),
        bar=f">= {bar:g}x",
        met=ratio >= bar,
        why="" if ratio >= bar else why,
        commands=_COMMANDS,
        detail={
            "workers": {"ours": bench.workers[("B", count)], "other": bench.workers[("A", count)]},
            "cpu": {"ours": round(ours.cpu, 2), "other": round(other.cpu, 2)},
            "note": "CPU seconds cover the whole process, including imports",
        },
    )


def _again(
    name: str,
    count: int,
    cold: Mapping[str, Sequence[Measured]],
    again: Mapping[str, Sequence[Measured]],
) -> Result:
    ours, other = middle(again["B"]), middle(again["A"])
    return Result(
        id=f"prepare-{name}-again",
        what=f"data preparation, {count:,} rows, second run on the same data",
        ours=round(ours.wall, 2),
        other=round(other.wall, 2),
        unit="s",
        ratio=round(other.wall / ours.wall, 1),
        bar=f"<= {LOAD_SECONDS:g} s, loading included",
        met=ours.wall <= LOAD_SECONDS,
        why="" if ours.wall <= LOAD_SECONDS else "hashing and loading the rows takes longer",
        commands=_COMMANDS,
        detail={"cold": round(middle(cold["B"]).wall, 2)},
    )


_COMMANDS = {
    "ours": "LLaMA-Factory's get_dataset() with the config as the train phase prepares it "
    "(tunesmith.job.training.phase.fit, dataset_cache.hasten); PROBE in benchmarks/prepare.py",
    "other": "the same with preprocessing_num_workers=16 overwrite_cache=true",
}


class _Bench:
    def __init__(self, work: Path) -> None:
        project = Project.at(ROOT)
        self._work = work
        self._python = project.environment().python
        self._model = build.fetch_model(project, MODEL, lambda _: None).path
        self._digests: dict[Path, set[str]] = {}
        self.workers: dict[tuple[str, int], int] = {}
        self._rows: dict[Path, int] = {}

    def make(self, name: str, count: int) -> Path:
        """Make a data set of so many rows."""
        folder = self._work / name
        folder.mkdir()
        rows.make(folder / "rows.jsonl", count, words=WORDS)
        rows.register(folder, "rows.jsonl")
        self._rows[folder] = count
        return folder

    def once(self, side: str, data: Path, number: int) -> Measured:
        """Prepare once; a cache of its own for each side and number."""
        config = rows.config(self._model, data, self._work / "output") | EXAMPLES
        result, log = self._work / "result.json", self._work / "log"
        cache = self._work / "caches" / f"{side}-{data.name}-{number}"
        words = ["ours" if side == "B" else "theirs", result]
        argv = [self._python, "-c", PROBE, json.dumps(config), str(self._rows[data]), *words]
        measured = measure(argv, log, env=plain_env(HF_HOME=str(cache)), cwd=self._work)
        found = json.loads(result.read_text(encoding="utf-8"))
        self._digests.setdefault(data, set()).add(found["digest"])
        self.workers[(side, self._rows[data])] = found["workers"]
        return Measured(found["seconds"], measured.cpu, measured.peak)

    def compare(self) -> None:
        """Raise CommandFailed unless all prepared the same."""
        for data, digests in self._digests.items():
            if len(digests) != 1:
                raise CommandFailed(f"{data.name}: {len(digests)} different results")
