"""The Docker engine that replica hosts run on: found, or started and stopped again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]

# Debian's client comes with the engine; another one on PATH may not fit it.
_DEBIAN_CLIENT = Path("/usr/bin/docker")
_START_SECONDS, _STOP_SECONDS = 60, 60
NEEDS = "apt-get install -y docker.io debootstrap iptables openssh-client"


class NoEngine(Exception):
    """Replica hosts cannot be made here; the text says what is missing."""


@dataclass(frozen=True)
class Engine:
    """A running Docker engine, and the lock that its users share."""

    users: IO[str]

    def stop(self) -> None:
        """End the engine if tests started it and nobody else uses it."""
        with locked("engine"):
            try:
                # Instead of the share of it.
                fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            finally:
                ours = _started()
                self.users.close()
            if ours is not None:
                os.kill(ours, signal.SIGTERM)
                deadline = time.monotonic() + _STOP_SECONDS
                while _started() is not None:
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"dockerd, process {ours}, does not end")
                    time.sleep(0.1)


def state() -> Path:
    """Return the folder for disks, keys and locks (TUNESMITH_REPLICA_HOME)."""
    own = os.environ.get("TUNESMITH_REPLICA_HOME")
    folder = Path(own) if own else ROOT / ".tunesmith" / "replica"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock against other test runs on this machine."""
    with (state() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def docker(
    *words: str | Path, text: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a docker command. Raises RuntimeError with its words when it fails."""
    client = _DEBIAN_CLIENT if _DEBIAN_CLIENT.exists() else Path("docker")
    argv = [str(client), *map(str, words)]
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    done = subprocess.run(
        argv, input=text, capture_output=True, text=True, env=environment, check=False
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv[:4])} ...: {done.stderr.strip()[-3000:]}")
    return done


def start_engine() -> Engine:
    """Return the engine that answers, else start one. Raises NoEngine when that is impossible."""
    if os.geteuid() != 0:
        raise NoEngine("replica hosts need root")
    for program in ("dockerd", "debootstrap", "iptables", "ssh-keygen", "mkfs.ext4"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            raise NoEngine(f"replica hosts need {program}")
    with locked("engine"):
        users = (state() / "engine.users").open("w")
        fcntl.flock(users, fcntl.LOCK_SH)
        if _answers():
            return Engine(users)
        log = state() / "dockerd.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["/usr/sbin/dockerd", "--log-level", "warn"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not _answers():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                tail = log.read_text(errors="replace").strip().splitlines()[-3:]
                raise NoEngine(f"dockerd does not start: {' | '.join(tail)}")
            time.sleep(0.2)
        _pid_file().write_text(f"{process.pid}\n")
        # Whoever ends it last need not be its parent.
        threading.Thread(target=process.wait, daemon=True).start()
    return Engine(users)


def _pid_file() -> Path:
    return state() / "dockerd.pid"


def _started() -> int | None:
    """Return the process of the dockerd that tests of this clone started, if it runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(_pid_file().read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            return pid
    return None


def _answers() -> bool:
    return docker("version", "--format", "{{.Server.Version}}", check=False).returncode == 0
