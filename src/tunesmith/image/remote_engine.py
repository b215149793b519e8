"""A host's Docker engine, for the SDK: its socket brought here by an ssh of its own.

The SDK's own `ssh://` reads ~/.ssh/config only, not the inventory's file with the pinned keys.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import docker

from tunesmith.hosts.remote import Remote, last_words
from tunesmith.image import engine as image_engine

_SOCKET = "/var/run/docker.sock"
_OPEN_SECONDS = 40.0


@contextlib.contextmanager
def client(remote: Remote) -> Iterator[docker.DockerClient]:
    """Give a client of the host's engine, as long as the block lasts.

    Raises TunesmithError when ssh fails, UsageError when no engine answers there.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        here = Path(folder) / "docker.sock"
        options = ["BatchMode=yes", "LogLevel=ERROR", "ControlMaster=no", "ControlPath=none"]
        options += ["ExitOnForwardFailure=yes", "StreamLocalBindMask=0177"]
        words = [word for option in options for word in ("-o", option)]
        argv = ["ssh", "-F", str(remote.config), "-N", "-T", *words]
        argv += ["-L", f"{here}:{_SOCKET}", remote.name]
        with tempfile.TemporaryFile() as errors:
            ssh = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=errors)
            try:
                _wait(ssh, here, remote, errors)
                engine = image_engine.connect(f"unix://{here}")
                try:
                    yield engine
                finally:
                    engine.close()
            finally:
                ssh.terminate()
                ssh.wait()


def _wait(ssh: subprocess.Popen[bytes], here: Path, remote: Remote, errors: IO[bytes]) -> None:
    deadline = time.monotonic() + _OPEN_SECONDS
    while not here.exists():
        if ssh.poll() is not None or time.monotonic() > deadline:
            raise remote.failure(last_words(errors))
        time.sleep(0.05)
