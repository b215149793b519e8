"""Which flavour runs where: the table of drivers and GPUs, and its refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.doctor.flavours import Gpu, choose, choose_from_lines, means_no_gpu
from tunesmith.project import Project
from tunesmith.stack.definition import Stack

pytestmark = pytest.mark.unit

NAMES = {"6.1": "Tesla P40", "7.0": "Tesla V100", "8.9": "NVIDIA L40", "12.0": "RTX 5090"}


@pytest.fixture(scope="module")
def stack(project: Project) -> Stack:
    return project.stack


@pytest.fixture(scope="module")
def raw(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(project.stack.path.read_text(encoding="utf-8"))
    return found


def gpu(capability: str | None, driver: str) -> Gpu:
    return Gpu(NAMES.get(capability or "", "a GPU"), driver, capability)


# Per compute capability: the answer below 525, from 525, from 570, from 580. A star asks for
# the self-test and names the fallback.
TABLE = {
    "6.0": ("-", "cu126*", "cu126", "cu126"),
    "6.1": ("-", "cu126*", "cu126", "cu126"),
    "7.0": ("-", "cu128*cu126", "cu128", "cu128"),
    "7.5": ("-", "cu128*cu126", "cu128", "cu128"),
    "8.0": ("-", "cu128*cu126", "cu128", "cu128"),
    "8.6": ("-", "cu128*cu126", "cu128", "cu128"),
    "8.9": ("-", "cu128*cu126", "cu128", "cu128"),
    "9.0": ("-", "cu128*cu126", "cu128", "cu128"),
    "10.0": ("-", "-", "cu128", "cu128"),
    "10.3": ("-", "-", "cu128", "cu128"),
    "12.0": ("-", "-", "cu128", "cu128"),
    "3.7": ("-", "-", "-", "-"),
    "11.0": ("-", "-", "-", "-"),
    "13.0": ("-", "-", "-", "-"),
}
DRIVERS = (("470.82.01", "524.99"), ("525.60.13", "550.127"), ("570.26", "575.57"), ("580.65",))


@pytest.mark.parametrize("capability", TABLE)
def test_the_table(stack: Stack, capability: str) -> None:
    for answer, drivers in zip(TABLE[capability], DRIVERS, strict=True):
        for driver in drivers:
            decision = choose([gpu(capability, driver)], stack)
            told = decision.flavour or "-"
            told += "*" if decision.self_test else ""
            assert told + (decision.fallback or "") == answer, driver
            assert bool(decision.fix) == (answer == "-"), "a refusal has its fix, only that"


def test_pascal_between_the_native_drivers_needs_no_trial(stack: Stack) -> None:
    assert not choose([gpu("6.1", "560.28.03")], stack).self_test
    assert choose([gpu("6.1", "559.1")], stack).self_test


def test_every_number_is_the_stacks(stack: Stack) -> None:
    own = replace(stack.flavours["cu128"], minimum_driver=600, native_driver=610)
    moved = replace(stack, flavours={"cu128": own})
    decision = choose([gpu("8.9", "599.1")], moved)
    assert "needs 600 or newer for cu128" in decision.why
    assert choose([gpu("8.9", "600.1")], moved).self_test
    assert not choose([gpu("8.9", "610.1")], moved).self_test


def test_a_refusal_names_gpu_driver_and_what_to_choose(stack: Stack) -> None:
    decision = choose([gpu("12.0", "560.35.03")], stack)
    assert decision.why == (
        "driver 560.35.03 is too old: RTX 5090 (compute capability 12.0) needs 570 or newer for "
        "cu128"
    )
    assert decision.fix.startswith("choose a host with driver 570 or newer in the rental console")
    unknown = choose([Gpu("Tesla K80", "470.1", "3.7")], stack)
    assert unknown.why == "no flavour has code for Tesla K80 (compute capability 3.7)"


def test_mixed_gpus_need_one_flavour_for_all(stack: Stack) -> None:
    good = choose([gpu("8.9", "580.1"), gpu("7.0", "580.1")], stack)
    assert (good.flavour, good.gpus) == ("cu128", 2)
    older = choose([gpu("8.9", "580.1"), gpu("6.1", "580.1")], stack)
    assert older.flavour == "cu126"
    assert "cu128 has no code for Tesla P40" in older.why
    none = choose([gpu("12.0", "580.1"), gpu("6.1", "580.1")], stack)
    assert none.flavour is None
    assert "no flavour has code for all of RTX 5090" in none.why


def test_without_a_gpu_it_is_the_default(stack: Stack) -> None:
    decision = choose([], stack)
    assert (decision.flavour, decision.gpus, decision.self_test) == ("cu128", 0, False)
    assert choose([], stack, "cu126").flavour == "cu126"


def test_what_is_asked_for_is_taken_or_refused_never_replaced(stack: Stack) -> None:
    asked = choose([gpu("8.9", "550.1")], stack, "cu128")
    assert (asked.flavour, asked.self_test, asked.fallback) == ("cu128", True, None)
    refused = choose([gpu("12.0", "580.1")], stack, "cu126")
    assert refused.flavour is None
    assert refused.why == "cu126 has no code for RTX 5090 (compute capability 12.0)"
    assert refused.fix == "leave --flavour out: cu128 runs here"
    assert choose([gpu("3.7", "580.1")], stack, "cu126").fix.startswith("choose a GPU of compute")
    with pytest.raises(UsageError, match="flavour 'cu99' is unknown; known are cu128, cu126"):
        choose([], stack, "cu99")


def test_an_untold_capability_is_left_to_the_self_test(stack: Stack) -> None:
    decision = choose([gpu(None, "580.1")], stack)
    assert (decision.flavour, decision.self_test, decision.fallback) == ("cu128", True, "cu126")
    assert choose([gpu(None, "510.1")], stack).flavour is None


def test_lines_of_nvidia_smi_give_the_same(stack: Stack, raw: dict[str, Any]) -> None:
    lines = ["550.127.05, 8.9, NVIDIA GeForce RTX 4090", "550.127.05, 8.6, A name, with a comma"]
    gpus = [
        Gpu("NVIDIA GeForce RTX 4090", "550.127.05", "8.9"),
        Gpu("A name, with a comma", "550.127.05", "8.6"),
    ]
    assert choose_from_lines(lines, raw) == asdict(choose(gpus, stack))
    assert choose_from_lines(["580.1, [N/A], GRID V100"], raw)["self_test"] is True
    assert choose_from_lines([], raw, "")["flavour"] == "cu128"
    assert choose_from_lines([], raw, "cu126")["flavour"] == "cu126"


@pytest.mark.parametrize(
    "line",
    [
        "No devices were found",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure",
        "Failed to initialize NVML: Driver Not Loaded",
        "sh: 1: nvidia-smi: not found",
        "bash: line 1: nvidia-smi: command not found",
    ],
)
def test_an_absent_gpu_is_no_error(raw: dict[str, Any], line: str) -> None:
    assert choose_from_lines([line], raw)["flavour"] == "cu128"


@pytest.mark.parametrize(
    "line",
    [
        "Failed to initialize NVML: Unknown Error",
        "Failed to initialize NVML: Driver/library version mismatch",
        "Failed to initialize NVML: Function Not Found",
        "unknown, 8.9, NVIDIA L40",
        "Unable to determine the device handle for GPU 0000:17:00.0: GPU is lost.",
    ],
)
def test_a_broken_gpu_is_refused_with_its_words(raw: dict[str, Any], line: str) -> None:
    assert not means_no_gpu(line)
    decision = choose_from_lines([line], raw)
    assert decision["flavour"] is None
    assert decision["why"] == f"nvidia-smi fails: {line}"
    assert decision["fix"].startswith("restart the host")


def test_a_driver_that_does_not_tell_the_capability_is_too_old(raw: dict[str, Any]) -> None:
    decision = choose_from_lines(["470.82.01, [N/A], NVIDIA L40"], raw)
    assert decision["flavour"] is None
    assert "525 or newer" in decision["why"]


def test_ansible_gets_it_without_our_dependencies() -> None:
    code = (
        "import sys, tunesmith.doctor.flavours; "
        "print({'yaml', 'packaging', 'rich', 'tunesmith.stack.definition'} & set(sys.modules) "
        "or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"
