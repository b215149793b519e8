"""A host's Docker engine for the SDK, through its socket forwarded by a separate ssh.

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
    """Yield a client of the host's engine.

    Raises TunesmithError if ssh fails, UsageError if no engine answers there.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        socket = Path(folder) / "docker.sock"
        options = ["BatchMode=yes", "LogLevel=ERROR", "ControlMaster=no", "ControlPath=none"]
        options += ["ExitOnForwardFailure=yes", "StreamLocalBindMask=0177"]
        arguments = [word for option in options for word in ("-o", option)]
        argv = ["ssh", "-F", str(remote.config), "-N", "-T", *arguments]
        argv += ["-L", f"{socket}:{_SOCKET}", remote.name]
        with tempfile.TemporaryFile() as errors:
            ssh = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=errors)
            try:
                _wait(ssh, socket, remote, errors)
                engine = image_engine.connect(f"unix://{socket}")
                try:
                    yield engine
                finally:
                    engine.close()
            finally:
                ssh.terminate()
                ssh.wait()


def _wait(ssh: subprocess.Popen[bytes], socket: Path, remote: Remote, errors: IO[bytes]) -> None:
    deadline = time.monotonic() + _OPEN_SECONDS
    while not socket.exists():
        if ssh.poll() is not None or time.monotonic() > deadline:
            raise remote.failure(last_words(errors))
        time.sleep(0.05)
