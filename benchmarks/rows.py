"""Made rows for benchmarks: text of a made-up vocabulary, a third of it Chinese."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def make(path: Path, count: int, words: int = 130, seed: int = 1) -> None:
    """Write `count` rows in Alpaca's form as JSON Lines, no two alike.

    Answers have `words` words on average (130: about 900 bytes a row); Chinese ones take about
    as many tokens.
    """
    chance = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(20_000)]
    signs = [chr(code) for code in range(0x4E00, 0x5E00)]
    low, high = words // 2, words + words // 2
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            if number % 3:
                asked = " ".join(chance.choices(known, k=words // 6))
                told = " ".join(chance.choices(known, k=chance.randint(low, high)))
            else:
                asked = "".join(chance.choices(signs, k=words // 4))
                told = "".join(chance.choices(signs, k=chance.randint(low, high + words // 2)))
            row = {"instruction": asked, "input": "", "output": told}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def register(folder: Path, *files: str) -> None:
    """Write the registry of `folder`: each file under its stem."""
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    entries = {Path(file).stem: {"file_name": file, "columns": columns} for file in files}
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")


def config(model: Path, data: Path, output: Path) -> dict[str, Any]:
    """Return LLaMA-Factory's keys for preparing the rows of `data`, registered as `rows`."""
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(data),
        "template": "smollm",
        "cutoff_len": 1024,
        "output_dir": str(output),
        "report_to": "none",
    }
