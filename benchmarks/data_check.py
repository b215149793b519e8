"""The data check against what people do: json.load, and LLaMA-Factory's own preparation.

Rows are made with a fixed seed, some 900 bytes each, a third of them Chinese: 100,000 for the
comparison, 1,000,000 for time and memory of the check. Each measurement is a process of its
own; wall time, processor time and peak memory are the kernel's (wait4).

    PYTHONPATH=tests:src nice .venv/bin/python benchmarks/data_check.py MODEL_FOLDER
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tunesmith.project import Project

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = 100_000, 1_000_000

OURS = """
import sys
from pathlib import Path
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry

columns = {"prompt": "instruction", "query": "input", "response": "output"}
report = check_file(Path(sys.argv[1]), Entry("k", columns=columns), thorough=sys.argv[2] == "all")
print(report.rows, report.kept, report.error_count, report.warning_count)
"""
LOAD = "import json, sys; print(len([json.loads(line) for line in open(sys.argv[1])]))"
THEIRS = """
import json, sys, tempfile
from llamafactory.data.loader import get_dataset
from tunesmith.job.replay import Loaded

with tempfile.TemporaryDirectory() as scratch:
    loaded = Loaded.of(json.load(open(sys.argv[1])), scratch)
    loaded.data_args.preprocessing_num_workers = 2
    module = get_dataset(
        loaded.codec.template, loaded.model_args, loaded.data_args, loaded.training_args,
        stage="sft", tokenizer=loaded.codec.tokenizer, processor=loaded.codec.processor,
    )
    print(len(module["train_dataset"]))
"""


def main(model: Path) -> int:
    """Make the rows, measure, print a table."""
    python = Project.at(ROOT).environment().python
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        for path, count in ((few, FEW), (many, MANY)):
            make(path, count)
            print(f"{path.name}: {count} rows, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        request, config = prepared(folder, model)
        control = [sys.executable, "-c"]
        for words, argv in (
            ("100 k: json.loads of each line, all kept", [*control, LOAD, str(few)]),
            ("100 k: data.check, rules only (as inv train)", [*control, OURS, str(few), "rules"]),
            ("100 k: data.check, all", [*control, OURS, str(few), "all"]),
            ("100 k: LLaMA-Factory's preparation, 2 processes", [python, "-c", THEIRS, config]),
            (
                "100 k: replay, 2 processes",
                [python, "-m", "tunesmith.job.replay", request, str(folder / "result")],
            ),
            ("1 M: data.check, rules only", [*control, OURS, str(many), "rules"]),
            ("1 M: data.check, all", [*control, OURS, str(many), "all"]),
        ):
            measure(words, [str(word) for word in argv])
    return 0


def make(path: Path, count: int) -> None:
    """Write rows: text of a made-up vocabulary, so that no two are alike."""
    generator = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(20_000)]
    signs = [chr(code) for code in range(0x4E00, 0x5E00)]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            if number % 3:
                asked = " ".join(generator.choices(words, k=20))
                told = " ".join(generator.choices(words, k=generator.randint(60, 200)))
            else:
                asked = "".join(generator.choices(signs, k=30))
                told = "".join(generator.choices(signs, k=generator.randint(80, 280)))
            row = {"instruction": asked, "input": "", "output": told}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def prepared(folder: Path, model: Path) -> tuple[Path, Path]:
    """Write the registry, a config, and the replay's request; return the last two."""
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    entry = {"file_name": "few.jsonl", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"few": entry}))
    config = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "few",
        "dataset_dir": str(folder),
        "template": "smollm",
        "cutoff_len": 1024,
    }
    request, alone = folder / "request.json", folder / "config.json"
    request.write_text(json.dumps({"config": config, "workers": 2}))
    alone.write_text(json.dumps(config))
    return request, alone


def measure(words: str, argv: list[str]) -> None:
    """Run a command and print wall time, processor time and peak memory of it and its children."""
    began = time.monotonic()
    quiet = os.open(os.devnull, os.O_WRONLY)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    files = [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
    pid = os.posix_spawn(argv[0], argv, environment, file_actions=files)
    _, status, usage = os.wait4(pid, 0)
    os.close(quiet)
    wall, processor = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    outcome = "" if status == 0 else f" FAILED ({os.waitstatus_to_exitcode(status)})"
    print(
        f"{words:<50} {wall:7.1f} s wall {processor:7.1f} s processor "
        f"{usage.ru_maxrss / 1024:6.0f} MB{outcome}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
