"""Failure classes, from the texts the real programs print."""

from __future__ import annotations

import signal

import pytest

from tunesmith.job.run.failures import CLASSES, classify_exit, classify_text

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "gpu_oom"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "gpu_oom"),
        ("RuntimeError: CUDA error: no kernel image is available for execution", "driver"),
        ("NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.", "driver"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found 11040)", "driver"),
        ("Failed to initialize NVML: Unknown Error", "driver"),
        ("OSError: [Errno 28] No space left on device", "disk_full"),
        (
            "RuntimeError: [enforce fail] PytorchStreamWriter failed writing file data/1",
            "disk_full",
        ),
        ("OSError: [Errno 30] Read-only file system: '/data/runs/x'", "read_only"),
        ('IoError(Os { code: 5, message: "Input/output error" })', "read_only"),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible", "host_oom"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", "host_oom"),
        (
            "RuntimeError: Cannot find valid samples, check `data/README.md` for the data format.",
            "data",
        ),
        ("ValueError: Undefined dataset x in dataset_info.json.", "data"),
        ("ValueError: Some keys are not used by the HfArgumentParser: ['lr']", "config"),
        ("ValueError: Target modules {'q'} not found in the base model.", "config"),
        ("KeyError: 'x'", "code"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert classify_text(f"Traceback (most recent call last):\n  ...\n{text}\n") == expected


@pytest.mark.parametrize(
    ("code", "tail", "oom", "expected"),
    [
        (-signal.SIGKILL, "", True, "host_oom"),
        (-signal.SIGKILL, "", False, "killed"),
        (-signal.SIGTERM, "", False, "killed"),
        (-signal.SIGSEGV, "", False, "killed"),
        (-signal.SIGABRT, "CUDA error: unspecified launch failure", False, "driver"),
        (1, "OSError: [Errno 28] No space left on device", False, "disk_full"),
        (1, "AttributeError: x", False, "code"),
    ],
)
def test_exits(code: int, tail: str, oom: bool, expected: str) -> None:
    failure, message = classify_exit(code, tail, oom_killed=oom)
    assert failure == expected
    assert message


def test_only_what_may_pass_by_itself_is_tried_again() -> None:
    assert {name for name, item in CLASSES.items() if item.retry} == {"stalled", "killed"}
    assert all(item.advice for item in CLASSES.values())
