"""A host's port forwarded to this machine's loopback by a separate ssh.

It is separate from the shared connection, which is for short commands; a forward in that one would
outlive this process. This ssh ends with us, and is restarted when the connection breaks.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from tunesmith.core import formats
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts import ssh_errors
from tunesmith.hosts.remote import Remote, last_words

LOOPBACK = "127.0.0.1"
# Pauses between reconnection attempts, in seconds; the last one is repeated.
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
# Errors that no retry can fix.
_FATAL = ("changed", "unpinned", "wrong_key")
_OPEN_SECONDS = 40.0
_PR_SET_PDEATHSIG = 1
# The state in /proc/net/tcp (proc(5), net/tcp_states.h).
_LISTENING = "0A"


def free_port(wanted: int | None, usual: int | None = None) -> int:
    """Return a free local port: the wanted one, otherwise the usual one, otherwise any.

    Raises UsageError if the wanted one is taken or invalid.
    """
    if wanted is not None:
        if not 0 < wanted < 65536:
            raise UsageError(f"port {wanted}: a number from 1 to 65535 is expected")
        if not _is_free(wanted):
            raise UsageError(
                f"port {wanted} of this machine is taken",
                hint="leave the port out for a free one, or find who has it: "
                f"`ss -ltnp sport = :{wanted}`",
            )
        return wanted
    if usual is not None and _is_free(usual):
        return usual
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As ssh does: a port whose last connection has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


class Tunnel:
    """`ssh -N -L` to one port of a host's loopback. Bound on 127.0.0.1 here, nowhere else."""

    def __init__(self, remote: Remote, there: int, here: int) -> None:
        self.remote = remote
        self.there = there
        self.here = here
        self._ssh: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._was_up = False

    def argv(self) -> list[str]:
        """Return the ssh command."""
        options = [
            "BatchMode=yes",
            "LogLevel=ERROR",
            "ControlMaster=no",
            "ControlPath=none",
            "ExitOnForwardFailure=yes",
            "GatewayPorts=no",
        ]
        words = [word for option in options for word in ("-o", option)]
        forward = f"{LOOPBACK}:{self.here}:{LOOPBACK}:{self.there}"
        return [
            *("ssh", "-F", str(self.remote.config), "-N", "-T", *words),
            *("-L", forward, self.remote.name),
        ]

    def open(self) -> None:
        """Connect; return when the port is there. Raises TunesmithError with ssh's reason."""
        self.close()
        # Else who has it would be taken for the other end.
        if not _is_free(self.here):
            raise self._taken()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._ssh = subprocess.Popen(
            self.argv(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is ours to answer
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        deadline = time.monotonic() + _OPEN_SECONDS
        while time.monotonic() < deadline:
            if not self.alive():
                raise self.error()
            if self._answers() and self._listens():
                self._was_up = True
                return
            time.sleep(0.05)
        self.close()
        raise TunesmithError(
            f"{self.remote.name}: no tunnel to {self.remote.host.address} after "
            f"{formats.duration(_OPEN_SECONDS)}",
            hint="the host may be overloaded; give the same command again",
        )

    def alive(self) -> bool:
        """Whether its ssh runs."""
        return self._ssh is not None and self._ssh.poll() is None

    def kind(self) -> ssh_errors.Kind:
        """Return why ssh ended."""
        return ssh_errors.kind_of(self._said(), jump=self.remote.host.jump is not None)

    def error(self) -> TunesmithError:
        """Return why ssh ended, as people are told."""
        said = self._said()
        if "listen" in said.lower() or "address already in use" in said.lower():
            return self._taken()
        host = self.remote.host
        if self._was_up and self.kind() not in _FATAL:
            last = ssh_errors.last_line(said)
            return TunesmithError(
                f"{host.name}: the connection to {host.address} was lost ({last})"
            )
        return ssh_errors.reason(
            self.kind(), host.name, host.address, ssh_errors.last_line(said), jump=host.jump
        ).error()

    def close(self) -> None:
        """End its ssh; nothing when there is none."""
        if self._ssh is not None:
            with contextlib.suppress(ProcessLookupError):
                self._ssh.terminate()
            try:
                self._ssh.wait(5)
            except subprocess.TimeoutExpired:
                self._ssh.kill()
                self._ssh.wait()
            self._ssh = None
        self._was_up = False
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _taken(self) -> UsageError:
        return UsageError(
            f"port {self.here} of this machine is taken by another program now; the same command "
            "without the port finds a free one"
        )

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((LOOPBACK, self.here)) == 0

    def _listens(self) -> bool:
        """Whether it is our ssh that has the port: another program may have been quicker.

        Where the system does not tell (no /proc), whoever answers is taken for it.
        """
        assert self._ssh is not None
        table, own = Path("/proc/net/tcp"), Path(f"/proc/{self._ssh.pid}/fd")
        if not table.exists():
            return True
        inodes = {
            fields[9]
            for fields in map(str.split, table.read_text().splitlines()[1:])
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == self.here
        }
        try:
            opened = {str(file.readlink()) for file in own.iterdir()}
        except OSError:
            return False  # it has ended meanwhile
        return any(f"socket:[{inode}]" in opened for inode in inodes)

    def _said(self) -> str:
        if self._errors is None:
            return ""
        return last_words(self._errors)


def _end_with_parent() -> None:
    """Let the kernel end this process when ours is gone, however that ended: prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def reopen(tunnel: Tunnel, tell: OnText) -> None:
    """Connect again, for as long as it takes, telling why when that changes.

    What changes is the kind of reason: ssh words one and the same differently from try to try,
    as what it sees first (an end of file, a broken pipe, a reset) is a matter of timing.

    Raises TunesmithError when trying again cannot help (another host key, a refused key).
    """
    told: ssh_errors.Kind | None = None
    for attempt in range(1_000_000):
        problem = tunnel.error() if attempt == 0 else _try(tunnel)
        if problem is None:
            tell(f"{tunnel.remote.name}: connected again")
            return
        kind = tunnel.kind()
        if isinstance(problem, UsageError) or kind in _FATAL:
            raise problem
        if kind != told:
            told = kind
            tell(f"{problem.line}; connecting again")
        time.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])


def _try(tunnel: Tunnel) -> TunesmithError | None:
    try:
        tunnel.open()
    except TunesmithError as problem:
        return problem
    return None
