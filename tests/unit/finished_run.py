"""Builds a finished run, with inputs and results that are sealed, and finds every file of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.files import sha256_of, write_json
from tunesmith.job.run import inputs, seals
from tunesmith.job.run.codec import decode, encode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest

# Each result: the phase that writes it, and its files. No content is looked at: what compares
# them is asked, not what loads them.
RESULTS = {
    "output": ("train", ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")),
    "bundle": ("bundle", ("bundle.json", "config.json")),
    "merged": ("merge", ("model.safetensors", "config.json", "MANIFEST.json", "Modelfile")),
    "predict": ("predict", ("generated_predictions.jsonl", "predict_results.json")),
    "export": ("export", ("run-bf16.gguf", "Modelfile")),
}
ENTRY = {"file_name": "rows.json", "columns": {"prompt": "q", "response": "a", "images": "i"}}


def make(top: Path) -> Path:
    """Return the folder of a run that was trained, merged, proven, asked and exported."""
    data, model, start = top / "data", top / "model", top / "start"
    write(data / "dataset_info.json", json.dumps({"rows": ENTRY, "folder": {"file_name": "many"}}))
    write(data / "rows.json", json.dumps([{"q": "?", "a": "!", "i": ["picture.png"]}]))
    write(data / "picture.png", "pixels")
    write(data / "many" / "1.json", "[]")
    write(model / "model.safetensors", "weights")
    write(model / "tokenizer.json", "tokens")
    write(start / "adapter_model.safetensors", "an earlier adapter")
    write(top / "deepspeed.json", "{}")
    files = {f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in model.iterdir()}
    run = top / "runs" / "run"
    config: dict[str, Any] = {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(start),
        "create_new_adapter": True,
        "output_dir": str(run / "output"),
        "dataset": "rows,folder",
        "dataset_dir": str(data),
        "deepspeed": str(top / "deepspeed.json"),
    }
    predict = {
        **{key: config[key] for key in ("model_name_or_path", "dataset_dir")},
        "eval_dataset": "rows",
        "output_dir": str(run / "predict"),
        "adapter_name_or_path": str(run / "output"),
    }
    request = {
        "run_id": "run",
        "created": "2026-01-14T09:30:05Z",
        "title": "a run",
        "config_file": "configs/train/x.yaml",
        "phases": ["before", "train", "after", "merge", "proof"],
        "model": {"name": "owner/model", "path": str(model), "files": files},
        "predict": predict,
    }
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    recorded = inputs.recorded(decode(RunRequest, request), config)
    write_json(run / "run.json", encode(recorded))
    seals.seal(run, "create", seals.REQUEST)
    inputs.remember(run, recorded, recorded.inputs)
    inputs.remember_model(run, recorded.model)
    for result, (phase, names) in RESULTS.items():
        for name in names:
            read = name in ("MANIFEST.json", "adapter_config.json")
            write(run / result / name, '{"files": {}}' if read else f"{result} {name}")
        seals.seal(run, phase, (result,))
    for name in seals.FILES:
        write(run / name, "{}\n")
        seals.seal(run, name.partition(".")[0], (name,))
    write_json(
        RunFolder(run).status_file,
        {"run_id": "run", "state": "succeeded", "phases": {"train": "succeeded"}, "failure": None},
    )
    return run


def write(file: Path, text: str) -> None:
    """Write a file and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def files_of(top: Path) -> Iterator[Path]:
    """Yield every input and result of a run made below `top`: not its records of progress."""
    for path in sorted(top.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.name != "status.json":
            yield path


def flip(file: Path, *, quietly: bool = False) -> None:
    """Change one bit in the middle; `quietly`: with the time stamp it had, as rot does."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    with file.open("r+b") as stream:
        stream.write(content)
    if quietly:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
