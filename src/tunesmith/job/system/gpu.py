"""What the GPUs are doing, as nvidia-smi tells it. Standard library only.

nvidia-smi can hang with a broken driver, so it is asked in a thread of its own: whoever
wants the figures gets the newest there are, at once.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass

# Fields of `nvidia-smi --query-gpu`; memory in MiB, utilisation in percent, degrees Celsius.
_FIELDS = ("name", "memory.used", "memory.total", "utilization.gpu", "temperature.gpu")
_PERIOD_SECONDS = 5.0
_TIMEOUT_SECONDS = 20.0
# Older figures say nothing about now.
_OLD_SECONDS = 30.0


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in bytes, utilisation in percent, temperature in degrees Celsius.

    None is what this GPU does not tell.
    """

    name: str
    memory_used: int | None
    memory_total: int | None
    utilisation: int | None
    temperature: int | None


def parse(text: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's answer (csv,noheader,nounits)."""
    found = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == len(_FIELDS):
            used, total, busy, heat = (_number(value) for value in row[1:])
            found.append(Gpu(row[0], _bytes(used), _bytes(total), busy, heat))
    return tuple(found)


def ask(timeout: float = _TIMEOUT_SECONDS) -> tuple[Gpu, ...]:
    """Return the GPUs now; empty when there are none or nvidia-smi does not answer."""
    query = f"--query-gpu={','.join(_FIELDS)}"
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse(done.stdout) if done.returncode == 0 else ()


class Sampler:
    """Asks every few seconds, for as long as this process lives."""

    def __init__(self) -> None:
        self._newest: tuple[Gpu, ...] = ()
        self._at = 0.0

    def start(self) -> None:
        """Begin asking, where there is an nvidia-smi to ask."""
        if shutil.which("nvidia-smi"):
            threading.Thread(target=self._go_on, daemon=True).start()

    def newest(self) -> tuple[Gpu, ...]:
        """Return the newest figures; empty without a GPU, or when they are old."""
        return () if time.monotonic() - self._at > _OLD_SECONDS else self._newest

    def _go_on(self) -> None:
        while True:
            if found := ask():
                self._newest, self._at = found, time.monotonic()
            time.sleep(_PERIOD_SECONDS)


def _number(text: str) -> int | None:
    # "[N/A]", "[Not Supported]", "[Unknown Error]" where the GPU has no such figure.
    return int(text) if text.strip().isdigit() else None


def _bytes(mebibytes: int | None) -> int | None:
    return None if mebibytes is None else mebibytes * 1024 * 1024
