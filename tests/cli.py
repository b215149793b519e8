"""`inv` as a user types it: run to its end, or left running and watched."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_URL = re.compile(r"is at (http://127\.0\.0\.1:(\d+))")
_ADDRESS = re.compile(r"is at (http://\S+)")
# The program that make setup puts beside this Python; unbuffered, so that lines come at once.
_INV = (sys.executable, "-u", str(Path(sys.executable).with_name("inv")))


def run(
    root: Path,
    *words: str,
    env: Mapping[str, str] = os.environ,
    text: str | None = None,
    timeout: float = 1200,
) -> subprocess.CompletedProcess[str]:
    """Run `inv` in a clone to its end; `text` is typed into it."""
    stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    return subprocess.run(
        [*_INV, *words],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **stdin,
    )


def said(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Assert how a command ended; return what it said, errors last."""
    told = done.stdout + done.stderr
    assert done.returncode == code, f"{done.args}: exit code {done.returncode}\n{told[-6000:]}"
    return told


def refusal(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """Assert that a command was refused in one line, and a hint at most; return both."""
    told = done.stderr.strip()
    assert done.returncode == code, f"{done.args}: exit code {done.returncode}\n{told[-6000:]}"
    assert re.fullmatch(r"error: .+(\nhint: .+)?", told), told
    return told


def start(root: Path, *words: str, env: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """Start `inv` in a clone, in a process group of its own; errors come among its output."""
    return subprocess.Popen(
        [*_INV, *words],
        cwd=root,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Return what `true` gives as soon as it is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


class Client:
    """An `inv` that stays, as a user has it in a terminal.

    `lines` are those it has printed, `times` when each came (seconds, as time.monotonic()).
    """

    def __init__(self, root: Path, env: Mapping[str, str], *words: str) -> None:
        self.process = start(root, *words, env=env)
        self.lines: list[str] = []
        self.times: list[float] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.times.append(time.monotonic())
            self.lines.append(line.rstrip("\n"))

    @property
    def said(self) -> str:
        """All that it has printed."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 240, begin: int = 0) -> int:
        """Wait for a line that matches, from line `begin` on; return its number."""
        deadline = time.monotonic() + seconds
        at = begin
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(5)
            while at < len(self.lines):
                if re.search(pattern, self.lines[at]):
                    return at
                at += 1
            if ended:
                break
            time.sleep(0.05)
        raise AssertionError(f"no line {pattern!r}:\n{self.said}")

    def url(self, seconds: float = 240) -> str:
        """The address of the service that it opened."""
        return self._told(_URL, seconds)

    def address(self, seconds: float = 240) -> str:
        """That address with the token that works once."""
        return self._told(_ADDRESS, seconds)

    def _told(self, pattern: re.Pattern[str], seconds: float) -> str:
        self.wait_for("Ctrl-C ends", seconds)
        found = pattern.search(self.said)
        assert found, self.said
        return found[1]

    @property
    def port(self) -> int:
        """The port of `url`."""
        return int(self.url().rpartition(":")[2])

    def interrupt(self, seconds: float = 60) -> int:
        """Press Ctrl-C; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.end(seconds)

    def end(self, seconds: float = 300) -> int:
        """Wait for the end; return the exit code."""
        code = self.process.wait(seconds)
        # A program that it left running may have the pipe still.
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """Be gone, however."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def clients(root: Path, env: Mapping[str, str]) -> Iterator[Callable[..., Client]]:
    """Start clients by their words; what still runs at the end is killed."""
    started: list[Client] = []

    def begin(*words: str, root: Path = root) -> Client:
        started.append(Client(root, env, *words))
        return started[-1]

    yield begin
    for one in started:
        one.kill()
