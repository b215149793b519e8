"""The GPUs as nvidia-smi tells them, who uses them, and CUDA toolkits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tunesmith.hosts.answers import Shape, Text
from tunesmith.hosts.probe.answer import PATH, WORDS, Answer
from tunesmith.hosts.probe.program import Program, programs

_MIB = 1 << 20
_DRIVER = re.compile(r"[0-9]{1,5}(\.[0-9]{1,5}){0,4}")
_CAPABILITY = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}")
_MEMORY = re.compile(r"([0-9]{1,12}) MiB")
_PID = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it; memory in bytes.

    `capability` is None where nvidia-smi does not say (drivers before 510, some slices).
    """

    name: str
    driver: str
    capability: str | None
    memory_total: int | None = None
    memory_used: int | None = None

    @property
    def line(self) -> str:
        """Driver, compute capability and name, as nvidia-smi writes these three."""
        return f"{self.driver}, {self.capability or '[N/A]'}, {self.name}"


@dataclass(frozen=True)
class Gpus:
    """`nvidia_smi` is its path, None without one; `text` what it says beside GPUs.

    `kernel_module` is the version of the machine's own driver, which a container may see
    without a GPU.
    """

    nvidia_smi: str | None
    text: str
    kernel_module: str | None
    other_accelerators: tuple[str, ...]
    gpus: tuple[Gpu, ...]

    SECTION: ClassVar[str] = "gpu"
    SHAPES: ClassVar[Mapping[str, Shape]] = {
        "nvidia_smi": PATH,
        "kernel_module": Text(r"\d{1,4}(\.\d{1,4}){0,4}", 25, "a version"),
        **dict.fromkeys(("nvidia_smi.text", "gpu", "other_accelerator"), WORDS),
    }

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each GPU, and what nvidia-smi said instead."""
        return (*(gpu.line for gpu in self.gpus), *([self.text] if self.text else []))

    @classmethod
    def read(cls, answer: Answer) -> Gpus:
        """Return the section; a line that is no GPU counts as words of nvidia-smi."""
        gpus, said = [], [answer.one("nvidia_smi.text")]
        for line in answer.all("gpu"):
            words = [word.strip() for word in line.split(",", 4)]
            if len(words) == 5 and _DRIVER.fullmatch(words[0]):
                driver, capability, total, used, name = words
                known = capability_of(capability)
                gpus.append(Gpu(name, driver, known, _memory(total), _memory(used)))
            else:
                said.append(line)
        return cls(
            nvidia_smi=answer.one("nvidia_smi") or None,
            text=" ".join(filter(None, said)),
            kernel_module=answer.one("kernel_module") or None,
            other_accelerators=tuple(answer.all("other_accelerator")),
            gpus=tuple(gpus),
        )


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; `memory` (bytes) is None where the container hides it."""

    pid: int
    name: str
    memory: int | None


@dataclass(frozen=True)
class GpuUse:
    """The processes that compute on GPUs."""

    processes: tuple[GpuProcess, ...]

    SECTION: ClassVar[str] = "gpu_use"
    SHAPES: ClassVar[Mapping[str, Shape]] = {"gpu_process": WORDS}

    @classmethod
    def read(cls, answer: Answer) -> GpuUse:
        """Return the section; what is no line of nvidia-smi is left out."""
        found = []
        for line in answer.all("gpu_process"):
            words = [word.strip() for word in line.split(",", 2)]
            if len(words) == 3 and _PID.fullmatch(words[0]):
                found.append(GpuProcess(int(words[0]), words[2], _memory(words[1])))
        return cls(tuple(found))


@dataclass(frozen=True)
class Cuda:
    """`cuda` is what /usr/local/cuda is, `nvcc` the compiler that a shell finds, `toolkits` the
    folders by version that provisioning takes: its own, or /usr/local/cuda."""

    cuda: Program | None
    nvcc: Program | None
    toolkits: tuple[Program, ...]

    SECTION: ClassVar[str] = "cuda"
    SHAPES: ClassVar[Mapping[str, Shape]] = dict.fromkeys(("cuda", "nvcc", "toolkit"), WORDS)

    @classmethod
    def read(cls, answer: Answer) -> Cuda:
        """Return the section."""
        return cls(
            cuda=next(iter(programs(answer, "cuda")), None),
            nvcc=next(iter(programs(answer, "nvcc")), None),
            toolkits=programs(answer, "toolkit"),
        )


def capability_of(text: str) -> str | None:
    """Return a compute capability such as 8.9, or None for [N/A] and the like."""
    return text.strip() if _CAPABILITY.fullmatch(text.strip()) else None


def _memory(text: str) -> int | None:
    found = _MEMORY.fullmatch(text)
    return int(found[1]) * _MIB if found else None
