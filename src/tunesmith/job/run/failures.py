"""Failures by class: what a person does next depends on the class, not on the traceback."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from tunesmith.core.errors import TunesmithError
from tunesmith.job.run import messages


@dataclass(frozen=True)
class FailureClass:
    """One kind of failure.

    `retry` says whether starting again from the newest valid checkpoint can help
    without any change; `advice` is what a person should do.
    """

    name: str
    retry: bool
    advice: str


CLASSES = {
    item.name: item
    for item in (
        FailureClass(
            "gpu_oom",
            False,
            "lower cutoff_len, or choose a GPU with more memory; batch size and gradient "
            "checkpointing were already lowered as far as they go",
        ),
        FailureClass(
            "host_oom",
            False,
            "the machine's memory limit was reached: lower preprocessing_num_workers and "
            "dataloader_num_workers, or rent more memory",
        ),
        FailureClass(
            "nan",
            False,
            "lower learning_rate (a third is a good try), set max_grad_norm: 1.0, and use bf16 "
            "instead of fp16 where the GPU has it",
        ),
        FailureClass("disk_full", False, "free space on that disk, then `inv resume --run RUN`"),
        FailureClass(
            "read_only",
            False,
            "the disk cannot be written: remount it, restart the instance or move to another "
            "disk, then `inv resume --run RUN`",
        ),
        FailureClass(
            "stalled",
            True,
            "no step for a long time; the stacks of all threads are in train.log",
        ),
        FailureClass(
            "driver",
            False,
            "the GPU or its driver failed: restart the instance or move to another one, then "
            "`inv resume --run RUN`",
        ),
        FailureClass(
            "model",
            False,
            "fix what is named above, then `inv resume --run RUN`",
        ),
        FailureClass(
            "changed",
            False,
            "restore what is named above, then `inv resume --run RUN`",
        ),
        FailureClass("data", False, "fix the data set: `inv data.check` names the rows"),
        FailureClass("config", False, "fix the config; the key is named above"),
        FailureClass("code", False, "see train.log; the last lines are shown above"),
        FailureClass("killed", True, "`inv resume --run RUN` continues from the newest checkpoint"),
    )
}


class JobError(TunesmithError):
    """A failure in a phase, with its class.

    `retry` says whether this one may pass by itself; None leaves it to the class.
    """

    def __init__(
        self,
        failure: str,
        message: str,
        detail: tuple[str, ...] = (),
        *,
        hint: str = "",
        retry: bool | None = None,
    ) -> None:
        super().__init__(message, detail, hint=hint)
        self.failure = CLASSES[failure].name
        self.retry = retry


# The first that matches decides: what the machine says, as PyTorch, the NVIDIA driver and glibc
# print it, then LLaMA-Factory's own sentences (messages.py), then those of what it calls.
_MACHINE: tuple[tuple[str, str], ...] = (
    ("gpu_oom", r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    (
        "driver",
        r"\bXid\b|fallen off the bus|uncorrectable ECC|Failed to initialize NVML"
        r"|CUDA error: (?!out of memory)|no kernel image is available"
        r"|NVIDIA driver on your system is too old|CUDA initialization|unspecified launch failure",
    ),
    (
        "disk_full",
        r"No space left on device|Errno 28|Disk quota exceeded|PytorchStreamWriter failed",
    ),
    ("read_only", r"Read-only file system|\[Errno (?:5|30)\]|Input/output error"),
    (
        "host_oom",
        r"DataLoader worker \(pid[^)]*\) is killed by signal: (?:Bus error|Killed)"
        r"|Cannot allocate memory|DefaultCPUAllocator: can't allocate memory|^MemoryError",
    ),
)
# transformers 4.52, datasets 3.6, peft 0.15 and torch.
_LIBRARIES: tuple[tuple[str, str], ...] = (
    (
        "data",
        r"DatasetGenerationError|JSONDecodeError|ArrowInvalid|^StopIteration"
        r"|num_samples should be a positive integer value, but got num_samples=0",
    ),
    (
        "config",
        r"Some keys are not used by the HfArgumentParser|Please specify|(?:^|: )`?--\w+"
        r"|requires non-zero --|lr_scheduler_type \w+ requires|Seed must be between 0"
        r"|Target modules .* not found|must be an integer if bigger than 1"
        r"|warmup_(?:ratio|steps) must |At most one of fp16 and bf16"
        r"|Your setup doesn't support bf16/gpu|requires Ampere or a newer GPU"
        r"|batch_size should be a positive integer|num_proc must be an integer"
        r"|num_workers option should be non-negative|`r` should be a positive integer"
        r"|dropout probability has to be between|Invalid (?:learning rate|beta parameter|epsilon)"
        r"|Invalid weight_decay value|test_size=\S+ should be|EarlyStoppingCallback requires"
        r"|Can't find 'adapter_config.json' at|is not supported, only azure_ml"
        # A package that a key asks for.
        r"|No package metadata was found|You need to (?:install|have) `|is not installed!"
        r"|Callback requires \w+ to be installed|: Please install |transformers\S+ is required"
        r"|No module named '(?:swanlab|wandb|mlflow|galore_torch|apollo_torch|badam|adam_mini"
        r"|deepspeed|unsloth|hqq|eetq|aqlm|auto_gptq|awq|optimum|MoD|vllm|sglang)'",
    ),
)


def of_the_machine(text: str) -> str | None:
    """Return the class of an error text that speaks of GPU, memory or disk; None for any other."""
    return _first(_MACHINE, text)


def classify_text(text: str) -> str:
    """Return the class of an error text; `code` when nothing else fits."""
    if machine := of_the_machine(text):
        return machine
    if sentence := messages.find(text):
        return sentence.failure
    return _first(_LIBRARIES, text) or "code"


def _first(patterns: tuple[tuple[str, str], ...], text: str) -> str | None:
    found = (name for name, pattern in patterns if re.search(pattern, text, re.MULTILINE))
    return next(found, None)


def classify_exit(code: int, log_tail: str, *, oom_killed: bool) -> tuple[str, str]:
    """Return (class, one line) for a worker that ended without naming its failure.

    `code` is as subprocess reports it: negative for a signal.
    """
    if code < 0:
        name = signal.Signals(-code).name
        if oom_killed:
            return "host_oom", f"the worker was ended by {name}: the memory limit was reached"
        if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
            return "killed", f"the worker was ended by {name}"
        found = classify_text(log_tail)
        # A crash in native code (SIGSEGV, SIGBUS, SIGABRT) may well be a passing fault.
        return (found if found != "code" else "killed"), f"the worker crashed with {name}"
    last = next((line for line in reversed(log_tail.splitlines()) if line.strip()), "no output")
    return classify_text(log_tail), f"the worker ended with exit code {code}: {last.strip()[:300]}"
