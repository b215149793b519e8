"""A run folder made by hand, and a tiny model to train in it by real LLaMA-Factory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from event_rows import event_rows
from overlay import STANDIN, overlaid
from tunesmith.core import isolated
from tunesmith.core.files import read_json, sha256_of, write_json
from tunesmith.job.run import inputs
from tunesmith.job.run.codec import decode, encode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest

STEPS = 300
SAVE_STEPS = 5

STANDINS = Path(__file__).resolve().parent / "standins"
TINY = STANDINS / "tiny_llama.py"


class Job:
    """A run folder made by hand, worked on through `python -m tunesmith.job`."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self.folder = RunFolder(folder)

    def make(
        self,
        model: Path,
        data: Path,
        *,
        limits: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        preset: str = "none",
        standin: Path | None = None,
        **config: Any,
    ) -> Job:
        self.folder.path.mkdir(parents=True)
        if standin is not None:
            self.python = overlaid(self.python, self.folder.path.parent.parent / "environment")
            env = {**(env or {}), STANDIN: str(standin)}
        values: dict[str, Any] = {
            "model_name_or_path": str(model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_target": "all",
            # Dropout makes the losses depend on the restored random state.
            "lora_dropout": 0.1,
            "dataset": "rows",
            "dataset_dir": str(data),
            "template": "smollm",
            "cutoff_len": 128,
            "output_dir": str(self.folder.output),
            "logging_steps": 1,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1.0e-3,
            "lr_scheduler_type": "cosine",
            "seed": 7,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,
            "include_num_input_tokens_seen": True,
        }
        self.folder.config_file.write_text(yaml.safe_dump(values | config))
        request = {
            "run_id": self.folder.run_id,
            "phases": ["train"],
            "preset": preset,
            "data": [{"key": "rows", "rows": 48}],
            "limits": {"restarts": 1000, "dump_seconds": 1, **(limits or {})},
            "env": {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **(env or {})},
        }
        recorded = inputs.recorded(decode(RunRequest, request), values | config)
        write_json(self.folder.request_file, encode(recorded))
        return self

    def call(self, verb: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = isolated.argv(self.python, "tunesmith.job", verb, str(self.folder.path))
        return subprocess.run(argv, check=check, capture_output=True, text=True)

    def state(self) -> str:
        return self.folder.status().state

    def wait(self, done: Callable[[], bool], what: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s\n{self.log_tail()}"
            time.sleep(0.02)

    def wait_for_end(self, expected: str) -> None:
        self.wait(lambda: self.state() not in ("running", "queued"), "the end", 400)
        assert self.state() == expected, f"{self.folder.status()}\n{self.log_tail()}"
        # The state is written a moment before the lock is given back.
        self.wait(lambda: not self.folder.busy(), "the lock", 60)

    def log_tail(self) -> str:
        return self.folder.log_file.read_text(errors="replace")[-3000:]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in event_rows(self.folder.events_file) if e["event"] == name]

    def losses(self) -> dict[int, float]:
        return {e["step"]: e["loss"] for e in self.events("log")}

    def step(self) -> int:
        return max((e["step"] for e in self.events("log")), default=0)

    def supervisor(self) -> int:
        return int(read_json(self.folder.status_file)["supervisor"]["pid"])

    def worker(self) -> int:
        """The worker's pid, as it wrote it itself; 0 before its first step."""
        try:
            return int(read_json(self.folder.heartbeat_file)["pid"])
        except FileNotFoundError:
            return 0

    def adapter(self) -> str:
        return sha256_of(self.folder.output / "adapter_model.safetensors")
