"""Disks that take nothing, and runs that live on them."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tunesmith
from event_rows import event_rows
from support import lacking
from tunesmith.core.files import write_json
from tunesmith.job.run.folder import RunFolder

STANDINS = Path(__file__).parent / "standins"
# Told only where a test hangs.
PATIENCE = 120.0


class Disk:
    """A small file system of its own at `folder`, for a `with` block; needs root.

    `way` is how it refuses: `full`, filled to the last byte; `read_only`, mounted so; `eio`,
    every change fails with EIO, through a library in the processes of `variables`.
    """

    def __init__(self, folder: Path, way: str, size: str = "4m") -> None:
        self.folder = folder
        self._size = size
        self.way = way
        self._filler = folder / "filler"
        self._switch = folder.with_name(f"{folder.name} refuses")
        self._count = folder.with_name(f"{folder.name} refused")
        self.variables: dict[str, str] = {}

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.way == "eio":
            self.variables = self._inject()
        else:
            self._mount("-t", "tmpfs", "-o", f"size={self._size}", "tunesmith")
        return self

    def __exit__(self, *_: object) -> None:
        if self.way == "eio":
            self._switch.unlink(missing_ok=True)
            return
        while subprocess.run(["umount", "-l", self.folder], capture_output=True).returncode == 0:
            pass

    def refuse(self) -> None:
        """Take nothing from now on."""
        if self.way == "full":
            self.fill()
            assert os.statvfs(self.folder).f_bavail == 0
        elif self.way == "eio":
            self._switch.write_text(str(errno.EIO))
        else:
            self._mount("--bind", self.folder)
            subprocess.run(["mount", "-o", "remount,bind,ro", self.folder], check=True)

    def take(self) -> None:
        """Take everything again."""
        if self.way == "full":
            self._filler.unlink()
        elif self.way == "eio":
            self._switch.unlink()
            assert self._count.stat().st_size > 0, "nothing was refused"
        else:
            subprocess.run(["umount", "-l", self.folder], check=True)

    def fill(self) -> None:
        """Fill it to the last byte, what becomes free meanwhile too."""
        with self._filler.open("ab", buffering=0) as stream:
            for size in (1 << 20, 4096, 1):
                try:
                    while stream.write(b"\1" * size) == size:
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    def _mount(self, *options: str | Path) -> None:
        done = subprocess.run(["mount", *options, self.folder], capture_output=True)
        if done.returncode != 0:
            lacking("no right to mount a small file system", "run the tests as root")

    def _inject(self) -> dict[str, str]:
        if shutil.which("gcc") is None:
            lacking("no C compiler", "`apt-get install gcc`")
        library = self.folder.with_name("refusing_disk.so")
        source = STANDINS / "refusing_disk.c"
        built = ["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
        subprocess.run(built, check=True, capture_output=True)
        return {
            "LD_PRELOAD": str(library),
            "REFUSING_FOLDER": str(self.folder),
            "REFUSING_SWITCH": str(self._switch),
            "REFUSING_COUNT": str(self._count),
        }


class Steps:
    """A run of the stand-in phase, under the real supervisor, on a disk."""

    def __init__(self, disk: Disk, run_id: str, **request: Any) -> None:
        self.folder = RunFolder(disk.folder / run_id)
        self.folder.path.mkdir()
        about = {"run_id": run_id, "created": run_id, "title": run_id, "phases": ["fetch"]}
        write_json(self.folder.request_file, about | request)
        self._python = disk.folder.with_name("python of the worker")
        code = str(Path(tunesmith.__file__).parents[1])
        self._worker = [sys.executable, str(STANDINS / "steps_worker.py")]
        # The supervisor hides PYTHONPATH from its workers.
        self._python.write_text(
            f'#!/bin/sh\nPYTHONPATH={shlex.quote(code)} exec {shlex.join(self._worker)} "$@"\n'
        )
        self._python.chmod(0o755)
        self._variables = {**os.environ, **disk.variables, "PYTHONPATH": code}
        self._variables["STEPS_WORKER"] = str(self._python)
        self.log = disk.folder.with_name("log of the supervisor")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, first: bool = True) -> Steps:
        """Begin, and return when the first steps are told (`first`)."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._worker, "supervise", str(self.folder.path)],
                stdout=log,
                stderr=log,
                env=self._variables,
            )
        if first:
            self.wait(lambda: len(self.steps()) >= 3, "the first steps")
        return self

    def workers(self) -> list[int]:
        """Return the pids of what the supervisor has started."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in children for pid in file.read_text().split()]

    def end(self) -> int:
        """Wait for the supervisor's end; return its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def wait(self, done: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < deadline, f"{what}\n{self.said()}"
            time.sleep(0.02)

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events("log")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in event_rows(self.folder.events_file) if e["event"] == name]

    def said(self) -> str:
        return self.log.read_text()
