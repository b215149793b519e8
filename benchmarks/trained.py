"""A process that trains by LLaMA-Factory as it is told, and says how fast.

Runs in the training environment, with or without a GPU: `python trained.py ORDER RESULT`.
ORDER is JSON: {"name", "config", "warmup", "fast", "count"}; `config` is a LLaMA-Factory config,
`warmup` the steps left out of the timing, `fast` takes the fast preset's trainer, `count` counts
the launches of a step. RESULT is JSON too. Tokens are counted without padding, from the data set
the trainer holds. Loss is what the trainer logged at each step; the gradient norm too: a training
with norm 0 computes fast and learns nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from llamafactory.train.tuner import run_exp
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Wall time of the steps after the first `warmup`, and what was trained in them."""

    def __init__(self, warmup: int, counts: bool = False) -> None:
        self.warmup, self.counts = warmup, counts
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.began = self.ended = 0.0
        self.timed = 0
        self.tokens_per_step = self.rows_per_step = 0.0
        self.launches: int | None = None
        self._counter: Launches | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the data: rows, and tokens that are no padding."""
        rows = kwargs["train_dataloader"].dataset
        # Packed rows number their samples 1, 2, ... in the mask; 0 is padding everywhere.
        real = [sum(1 for mark in row["attention_mask"] if mark) for row in rows]
        samples = [max(row["attention_mask"]) for row in rows]
        steps = len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps
        self.tokens_per_step, self.rows_per_step = sum(real) / steps, sum(samples) / steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the launches of the second step: the first one also sets things up."""
        if self.counts and state.global_step == 1:
            self._counter = Launches()
            self._counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock after the warm-up; stop it with each step."""
        if self._counter:
            self._counter.__exit__(None, None, None)
            self.launches, self._counter = self._counter.count, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        if state.global_step <= self.warmup:
            self.began = now
        else:
            self.timed += 1
            self.ended = now

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep losses and gradient norms."""
        logs = logs or {}
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs.get("grad_norm") or 0.0))


class Launches(TorchDispatchMode):
    """Counts operations as they reach the device's library; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def main(order_file: Path, result_file: Path) -> None:
    """Train once; on a GPU measure the rate of a large product before."""
    order = json.loads(order_file.read_text(encoding="utf-8"))
    peak = matmul_peak() if torch.cuda.is_available() else None
    result = {**train(order), "matmul_flops": peak}
    result_file.write_text(json.dumps(result, indent=1), encoding="utf-8")


def train(variant: dict[str, Any]) -> dict[str, Any]:
    """Run one training; return tokens a second and what proves that it trained."""
    clock = Clock(int(variant["warmup"]), bool(variant.get("count")))
    messages: list[Any] = []
    if variant.get("fast"):
        from tunesmith.job.training import fast_trainer

        fast_trainer.use(
            variant["config"],
            lambda *words, **more: messages.append([*words, more]),
            messages.append,
        )
    began = time.monotonic()
    run_exp(dict(variant["config"]), callbacks=[clock])
    seconds = clock.ended - clock.began
    steps = max(1, clock.timed)
    return {
        "seconds_per_step": seconds / steps,
        "tokens_per_step": clock.tokens_per_step,
        "rows_per_step": clock.rows_per_step,
        "tokens_per_second": clock.tokens_per_step * steps / seconds if seconds else None,
        "steps": len(clock.losses),
        "timed_steps": clock.timed,
        "all_seconds": time.monotonic() - began,
        "launches": clock.launches,
        "chosen": messages,
        "losses": clock.losses,
        "norms": clock.norms,
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def matmul_peak(size: int = 8192, rounds: int = 20) -> float:
    """Return the FLOP/s of a large bf16 product, on random data (zeros run faster)."""
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    started = time.monotonic()
    for _ in range(rounds):
        left @ right
    torch.cuda.synchronize()
    return 2 * size**3 * rounds / (time.monotonic() - started)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
