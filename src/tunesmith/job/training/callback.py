"""The callback between LLaMA-Factory's trainer and the job runner.

Imports transformers: only the worker of the train phase loads this module.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tunesmith.core.disk import shortage
from tunesmith.core.documents import Columns
from tunesmith.job.run import checkpoints
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.journal import Reporter
from tunesmith.job.system import disk

# Bytes needed besides the checkpoint itself: logs, status, the final adapter.
RESERVE_BYTES = 64 * 1024 * 1024
# Inodes: a checkpoint of a LoRA run has about a dozen files, a sharded one a few dozen.
RESERVE_INODES = 64
# Bytes per trainable parameter: float32 weight and two float32 Adam moments.
_BYTES_PER_TRAINABLE = 12


class Stopped(Exception):
    """Training ended on request, after a sealed checkpoint at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Reports progress, stops on SIGTERM, seals checkpoints, watches loss and disk.

    Events go to `report`. `keep` is the number of sealed checkpoints to keep (save_total_limit;
    None keeps all). `disk_wait` is how long, in seconds, the run waits for a full disk.
    """

    def __init__(self, report: Reporter, *, keep: int | None, disk_wait: float) -> None:
        self._report = report
        self._keep = keep
        self._disk_wait = disk_wait
        self._stop = False
        self._checkpoint_bytes = 0
        self._heartbeat_at = 0.0
        self._step_began = 0.0
        self._save_began = 0.0
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._tokens: tuple[float, int] | None = None
        signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, _signum: int, _frame: FrameType | None) -> None:
        # Only set a flag: a checkpoint is consistent only between two steps.
        self._stop = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Report the state of the run and estimate the size of a checkpoint."""
        trainable = sum(p.numel() for p in kwargs["model"].parameters() if p.requires_grad)
        self._checkpoint_bytes = trainable * _BYTES_PER_TRAINABLE
        if state.is_world_process_zero and state.global_step:
            self._report(
                "resumed",
                step=state.global_step,
                total_steps=state.max_steps,
                checkpoint=args.resume_from_checkpoint,
            )
        self._step_began = time.monotonic()
        self._heartbeat(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start timing a step."""
        self._step_began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the heartbeat; request a checkpoint after a stop request; wait for disk space."""
        # The first step ends the time in which long silence is normal, so report it at once.
        first = not self._step_seconds
        self._step_seconds.append(time.monotonic() - self._step_began)
        if self._stop_wanted_anywhere():
            self._stop = True
            control.should_save = True
        if first or control.should_save or time.monotonic() - self._heartbeat_at >= 1:
            self._heartbeat(state)
        if control.should_save:
            self._await_space(Path(args.output_dir), state)
            self._save_began = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Columns | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a logged loss; end the run if it is NaN or infinite."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        loss, norm = float(logs["loss"]), logs.get("grad_norm")
        self._report(
            "log",
            phase="train",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=round(float(state.epoch or 0), 4),
            loss=loss,
            learning_rate=logs.get("learning_rate"),
            grad_norm=None if norm is None else float(norm),
            tokens_per_second=self._throughput(int(state.num_input_tokens_seen)),
        )
        if not math.isfinite(loss):
            newest = max((s for s, p in checkpoints.folders(Path(args.output_dir))), default=None)
            remaining = (
                "there is no checkpoint" if newest is None else f"checkpoint-{newest} is kept"
            )
            raise JobError(
                "nan",
                f"the loss became {loss} at step {state.global_step} "
                f"(learning rate {logs.get('learning_rate')}, gradient norm {norm}); {remaining}",
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Columns | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the validation loss."""
        if metrics and "eval_loss" in metrics and state.is_world_process_zero:
            self._report("eval", step=state.global_step, loss=float(metrics["eval_loss"]))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the checkpoint just written, drop the oldest, and end a run asked to stop.

        Every rank writes its own part of it: sealed is what all have written, and no rank ends
        before it is.
        """
        output = Path(args.output_dir)
        _wait_for_all_ranks()
        if state.is_world_process_zero:
            sealed = checkpoints.seal(output / f"checkpoint-{state.global_step}")
            self._checkpoint_bytes = sealed.size
            if self._keep is not None:
                best = state.best_model_checkpoint
                checkpoints.rotate(output, self._keep, Path(best) if best else None)
            self._report(
                "checkpoint",
                step=sealed.step,
                path=str(sealed.path),
                bytes=sealed.size,
                seconds=round(time.monotonic() - self._save_began, 3),
            )
        _wait_for_all_ranks()
        if self._stop and state.global_step < state.max_steps:
            raise Stopped(state.global_step)

    def _stop_wanted_anywhere(self) -> bool:
        """Agree across all processes: one that saves alone would leave the others waiting."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return self._stop
        import torch

        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([int(self._stop)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _throughput(self, tokens: int) -> float | None:
        """Return tokens per second since the previous log, including padding."""
        now = time.monotonic()
        before, self._tokens = self._tokens, (now, tokens)
        if before is None or tokens <= before[1]:
            return None
        return round((tokens - before[1]) / (now - before[0]), 1)

    def _heartbeat(self, state: TrainerState, *, paused: bool = False) -> None:
        if not state.is_world_process_zero:
            return
        self._heartbeat_at = time.monotonic()
        median = statistics.median(self._step_seconds) if self._step_seconds else None
        self._report.heartbeat(
            {
                "pid": os.getpid(),
                "step": state.global_step,
                "total_steps": state.max_steps,
                "step_seconds": median,
                "paused": paused,
                "time": time.time(),
            }
        )

    def _await_space(self, output: Path, state: TrainerState) -> None:
        """Wait until a checkpoint fits on the disk; meanwhile the state is in memory.

        Raises JobError of class disk_full if no space was freed within `disk_wait` seconds, and of
        class read_only if the disk cannot be written and does not recover soon.
        """
        needed = int(self._checkpoint_bytes * 1.1) + RESERVE_BYTES
        began: float | None = None
        while (lack := _lack(output, needed)) is not None:
            failure, why = lack
            wait = self._disk_wait
            if failure == disk.READ_ONLY:
                wait = min(wait, disk.READ_ONLY_SECONDS)
            if began is None:
                began = time.monotonic()
                self._report("paused", step=state.global_step, why=why)
            if self._stop or time.monotonic() - began > wait:
                raise JobError(failure, f"no checkpoint at step {state.global_step}: {why}")
            self._heartbeat(state, paused=True)
            time.sleep(1)
        if began is not None:
            self._report("continued", step=state.global_step)


def _wait_for_all_ranks() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _lack(folder: Path, needed: int) -> tuple[str, str] | None:
    """Return the reason why a checkpoint cannot be written to `folder`: class and message."""
    if (lack := _lack_of_space(folder, needed)) is not None:
        return disk.FULL, lack
    if (error := disk.refusal(folder)) is not None:
        return disk.fault(error) or disk.FULL, disk.describe(folder, error)
    return None


def _lack_of_space(folder: Path, needed: int) -> str | None:
    """Return a message about what the disk of `folder` lacks, or None."""
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if (text := shortage(folder, free, needed, "a checkpoint")) is not None:
        return f"{text}; free space there"
    # Some file systems (btrfs, some network ones) do not count inodes and report 0 of 0.
    if stat.f_files and stat.f_favail < RESERVE_INODES:
        return (
            f"{folder} has {stat.f_favail} free inodes, a checkpoint needs {RESERVE_INODES}; "
            "delete small files there (`df -i` shows it)"
        )
    return None
