"""Training throughput on short rows: the fast preset against LLaMA-Factory's example.

Its example for LoRA (examples/train_lora in its repository, the keys in EXAMPLE here) takes one
row a pass, eight passes a step, with gradient checkpointing. Ours takes the same eight rows a
step by `--preset fast`: same rows, same order, same learning rate, so the losses of each step
can be compared. On a processor the real SmolLM2-135M is trained, by the example in bf16 and by ours
in what the job runner takes there. BENCH_SKIP=throughput-cpu leaves that out: it takes minutes.

On a machine with a GPU, in the training environment, with any tokenizer's folder:

    PYTHONPATH=src:. python -m benchmarks.throughput TOKENIZER_FOLDER WORK_FOLDER

trains the shape of DeepSeek-R1-Distill-Qwen-1.5B with random weights and writes
WORK_FOLDER/taken.json; `python -m benchmarks --take taken.json` puts it into the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.harness import ROOT, CommandFailed, Result
from tunesmith.job.system.resources import multiplies_bf16

EXAMPLE: Mapping[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4,
    "logging_steps": 1,
    "plot_loss": False,
    "overwrite_output_dir": True,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "bf16": True,
    # Of the measurement: no checkpoint, no bar, the same rate at each step whatever the end.
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "disable_tqdm": True,
}
# What `--preset fast` makes of it (plan/presets.py), and the job runner on a GPU
# (job/training/phase.py).
FAST: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "disable_gradient_checkpointing": True,
    "preprocessing_num_workers": None,
    "dataloader_num_workers": 0,
}
ON_GPU: Mapping[str, Any] = {"optim": "adamw_torch_fused", "dataloader_num_workers": 2}
# transformers refuses bf16 on a machine without a GPU unless it is told to use the processor.
ON_CPU: Mapping[str, Any] = {"use_cpu": True, "dataloader_num_workers": 0}
# On a processor AdamW is a loop over all adapters; on a GPU it is a few launches.
COUNTED: Mapping[str, Any] = {"optim": "adamw_torch_fused", "max_steps": 2}
# Multiplications of the linear layers and the head of the 1.5B shape: 4 FLOP each for a token
# of a frozen base (forward, and the gradient of the activations).
WEIGHTS_USED = 1.544e9
COMMANDS = {
    "ours": "inv train --preset fast --config CONFIG",
    "other": "llamafactory-cli train CONFIG  # the example's keys, see benchmarks/throughput.py",
}
Say = Callable[[str], None]


def run(work: Path, say: Say) -> list[Result]:
    """Measure on this machine's processor; a GPU has `python -m benchmarks.throughput`."""
    from tunesmith.project import Project

    project = Project.at(ROOT)
    python = project.environment().python
    found = sorted(project.models.glob("*SmolLM2-135M-Instruct@*"))
    if not found:
        raise CommandFailed("no SmolLM2-135M-Instruct here: `inv demo` fetches it")
    model = found[-1]
    shape = work / "shape"
    write_shape(shape, model, tiny=True)
    # Two steps of eight rows, and some to spare.
    write_rows(work, 24)
    base = {**EXAMPLE, **rows_of(work), "model_name_or_path": str(model), **ON_CPU}
    counted = {**EXAMPLE, **rows_of(work), "model_name_or_path": str(shape), **ON_CPU, **COUNTED}
    variants: list[dict[str, Any]] = []
    timed = "throughput-cpu" not in os.environ.get("BENCH_SKIP", "").split(",")
    for turn in range(2 if timed else 0):
        for side, more in (("other", {}), ("ours", {**FAST, "bf16": multiplies_bf16()})):
            config = {**base, **more, "output_dir": str(work / f"{side}{turn}"), "max_steps": 2}
            fast = side == "ours"
            variants.append({"name": f"{side}{turn}", "config": config, "warmup": 1, "fast": fast})
    for name, more, fast in (
        ("launches other", {}, False),
        ("launches ours", {**FAST}, True),
        ("launches 64", {**FAST, "per_device_train_batch_size": 64}, True),
    ):
        if name == "launches 64":
            write_rows(work, 128, "many")
            more = {**more, "dataset": "many"}
        config = {**counted, **more, "dataloader_num_workers": 0}
        config["output_dir"] = str(work / name.replace(" ", "_"))
        variants.append({"name": name, "config": config, "warmup": 1, "fast": fast, "count": True})
    results = trained(python, work, variants, say)
    launches = {
        name: results[f"launches {name}"]["launches"] / results[f"launches {name}"]["rows_per_step"]
        for name in ("other", "ours", "64")
    }
    same, many = launches["other"] / launches["ours"], launches["other"] / launches["64"]
    words = "kernel launches per row, 28-layer Qwen2, bf16"
    return [
        *([_on_processor(results)] if timed else []),
        Result(
            "throughput-launches",
            f"{words}: the same 8 rows per step",
            round(launches["ours"]),
            round(launches["other"]),
            "launches",
            same,
            ">= 11x fewer",
            same >= 11,
            commands=COMMANDS,
            detail={"with a CUDA graph": "1 launch per step"},
        ),
        Result(
            "throughput-launches-64",
            f"{words}: 64 packed rows per step",
            round(launches["64"]),
            round(launches["other"]),
            "launches",
            many,
            ">= 50x fewer",
            many >= 50,
            commands=COMMANDS,
        ),
    ]


def _on_processor(results: Mapping[str, Any]) -> Result:
    ours, other = (
        median(results[f"{side}{turn}"]["tokens_per_second"] for turn in range(2))
        for side in ("ours", "other")
    )
    gap = difference(results["ours0"], results["other0"])
    numbers = "bf16" if multiplies_bf16() else "float32"
    return Result(
        "throughput-cpu",
        "training SmolLM2-135M on a CPU, rows of 150 tokens, the same 8 rows per step",
        round(ours, 1),
        round(other, 1),
        "tokens/s",
        ours / other,
        ">= 3x at equal loss (within 1 %)",
        ours / other >= 3 and gap < 0.01,
        why="" if ours / other >= 3 else LIMITED_BY_ARITHMETIC,
        commands=COMMANDS,
        detail={
            "largest relative loss difference in a step": gap,
            "dtype": f"bf16 in the example, {numbers} in our job runner here",
            **proofs(results["ours0"]),
        },
    )


LIMITED_BY_ARITHMETIC = (
    "a CPU is limited by arithmetic and memory, not by launches: a third of our step is matrix "
    "products and a sixth attention, which both sides compute; most of the rest is norms, "
    "activations and adapters passing over memory, each a separate PyTorch kernel. What is "
    "saved: the second forward pass of checkpointing, padding, the head at untrained positions, "
    "small matrices"
)


def gpu(tokenizer: Path, work: Path) -> list[Result]:
    """Measure on this machine's GPU, in this process's environment."""
    say = print
    work.mkdir(parents=True, exist_ok=True)
    write_shape(work / "shape", tokenizer, tiny=False)
    write_rows(work, 800)
    base = {**EXAMPLE, **rows_of(work), "model_name_or_path": str(work / "shape")}
    fast = {**base, **FAST, **ON_GPU, "include_num_input_tokens_seen": True}
    variants = []
    for name, more, steps, warmup in (
        ("other0", base, 12, 3),
        ("ours0", fast, 200, 40),
        ("ours wide", {**fast, "per_device_train_batch_size": 64}, 30, 8),
        ("other1", base, 9, 3),
        ("ours1", fast, 200, 40),
    ):
        config = {**more, "output_dir": str(work / name.replace(" ", "_")), "max_steps": steps}
        kind = name.startswith("ours")
        variants.append({"name": name, "config": config, "warmup": warmup, "fast": kind})
    found = trained(Path(sys.executable), work, variants, say)
    ours = median(found[f"ours{n}"]["tokens_per_second"] for n in range(2))
    other = median(found[f"other{n}"]["tokens_per_second"] for n in range(2))
    gap = difference(found["ours0"], found["other0"])
    wide, peak = found["ours wide"]["tokens_per_second"], found["ours wide"]["matmul_flops"]
    share = max(wide, ours) * 4 * WEIGHTS_USED / peak
    lines = {
        "fast preset": [[n, loss] for n, loss in enumerate(found["ours0"]["losses"][:12], 1)],
        "example config": [[n, loss] for n, loss in enumerate(found["other0"]["losses"], 1)],
    }
    plot = {"title": "Loss of each step", "x": "step", "y": "loss", "lines": lines, "close": True}
    return [
        Result(
            "throughput-gpu",
            "training the 1.5B shape on a GPU, rows of 150 tokens, the same 8 rows per step",
            round(ours),
            round(other),
            "tokens/s",
            ours / other,
            ">= 20x at equal loss (within 1 %)",
            ours / other >= 20 and gap < 0.01,
            commands=COMMANDS,
            detail={
                "largest relative loss difference in a step": gap,
                "64 rows per step, tokens/s": round(wide),
                **proofs(found["ours0"]),
                "plots": [plot],
            },
        ),
        Result(
            "throughput-gpu-share",
            "share of the rate of a large bf16 matrix product, measured in the same run",
            round(share, 3),
            None,
            "of the product's rate",
            None,
            ">= 0.45",
            share >= 0.45,
            why=""
            if share >= 0.45
            else "the passes over activations between the matrix products (norms, rotary "
            "embedding, adapters in float32, logits in float32) are separate kernels",
            commands=COMMANDS,
            detail={"product, TFLOP/s": round(peak / 1e12)},
        ),
    ]


def trained(
    python: Path,
    work: Path,
    variants: list[dict[str, Any]],
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Train each variant in a process of its own; return by name what trained.py found out.

    transformers leaves the numbers' format of a training in variables of the process, where
    the next one would find it.
    """
    found = {}
    for variant in variants:
        one = found[variant["name"]] = _trained(python, work, variant)
        if not all(norm > 0 for norm in one["norms"]):
            raise CommandFailed(f"{variant['name']}: a gradient norm of 0: it does not train")
        speed = one["tokens_per_second"] or 0
        say(f"  {variant['name']}: {one['steps']} steps, {speed:.1f} tokens/s, {one['launches']}")
    return found


def _trained(python: Path, work: Path, variant: dict[str, Any]) -> dict[str, Any]:
    order, answer, log = work / "order.json", work / "answer.json", work / "log.txt"
    order.write_text(json.dumps(variant), encoding="utf-8")
    script = Path(__file__).with_name("trained.py")
    with log.open("wb") as output:
        done = subprocess.run(
            [python, script, order, answer], stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise CommandFailed(f"{variant['name']}: exit code {done.returncode}\n{tail}")
    report: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return report


def difference(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest relative difference of the losses of one step."""
    both = zip(ours["losses"], other["losses"], strict=False)
    return max(abs(mine - theirs) / theirs for mine, theirs in both)


def proofs(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return what shows that it trained."""
    return {
        "first and last loss": [round(one["losses"][0], 3), round(one["losses"][-1], 3)],
        "mean gradient norm": round(fmean(one["norms"]), 3),
        "tokens per step": round(one["tokens_per_step"]),
        "chosen": one["chosen"],
    }


def rows_of(work: Path) -> dict[str, Any]:
    """Return the data keys of a config."""
    return {"dataset": "rows", "dataset_dir": str(work / "data"), "template": "smollm"}


def write_rows(work: Path, count: int, name: str = "rows") -> None:
    """Write rows of about 150 tokens: words of a small vocabulary, so that there is something
    to learn in few steps."""
    import random

    chance = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["".join(chance.choices(letters, k=chance.randint(2, 6))) for _ in range(400)]
    folder = work / "data"
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "instruction": " ".join(chance.choices(known, k=chance.randint(4, 12))),
            "input": "",
            "output": " ".join(chance.choices(known, k=chance.randint(25, 55))),
        }
        for _ in range(count)
    ]
    (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    registry = folder / "dataset_info.json"
    entries = json.loads(registry.read_text(encoding="utf-8")) if registry.exists() else {}
    entries[name] = {"file_name": f"{name}.json"}
    registry.write_text(json.dumps(entries), encoding="utf-8")


def write_shape(folder: Path, tokenizer: Path, *, tiny: bool) -> None:
    """Write a Qwen2 of 28 layers with random weights; `tiny` has small matrices."""
    from benchmarks.random_model import SMALL, Shape, write_base

    write_base(folder, Shape(64, 128, 49152, 28, 4, 2) if tiny else SMALL)
    for file in tokenizer.iterdir():
        if "token" in file.name:
            shutil.copyfile(file, folder / file.name)


def main(tokenizer: Path, work: Path) -> None:
    """Measure on the GPU here and write WORK/taken.json."""
    import importlib.metadata
    import platform

    import torch

    from tunesmith.job.system.resources import cpu_count

    results = gpu(tokenizer, work)
    names = ("torch", "transformers", "peft", "llamafactory")
    taken = {
        "machine": f"{torch.cuda.get_device_name()}, {cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
        },
        "results": [asdict(result) for result in results],
    }
    (work / "taken.json").write_text(json.dumps(taken, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
