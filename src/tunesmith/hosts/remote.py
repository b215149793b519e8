"""A shell on a host of the inventory: one ssh exec a call, over a kept connection."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError
from tunesmith.hosts import inventory as inventories
from tunesmith.hosts import ssh_errors

# Bytes of output that an answer may have, and of errors beside it. A host that says more is
# not read on.
MOST_OUTPUT = 16 << 20
MOST_ERRORS = 1 << 20
# Of the errors, what is kept: the end says why.
_KEPT_ERRORS = 64 << 10
_LOOK_SECONDS = 0.1
# Exit status of ssh itself: a script that ends with it is said to end with 254.
SSH_FAILED = 255
_END = f"""
status=$?
[ "$status" -ne {SSH_FAILED} ] || status=254
exit "$status"
"""


class Remote:
    """A host by its name in the inventory, reached as its ssh_config says.

    Raises UsageError, naming the known hosts, when the name is not in the inventory.
    """

    def __init__(self, name: str, inventory: Path) -> None:
        self.name = name
        self.host = inventories.find(inventory, name)
        self.config = inventories.ssh_config(inventory.absolute())

    def argv(self, *words: str) -> list[str]:
        """Return the ssh command for `words`; each arrives as one word, whatever is in it."""
        return [*ssh_argv(self.config, self.name), *(shlex.quote(word) for word in words)]

    def run(
        self,
        script: str,
        *,
        arguments: Sequence[str] = (),
        stdin: str | None = None,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        most: int = MOST_OUTPUT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a POSIX sh script there; return its exit code and output, whatever they are.

        (But 255 comes as 254: with 255 ssh itself fails.)
        `arguments` become $1, $2, ...; `env` and `stdin` travel inside the connection, so
        they may be secret. `timeout` is in seconds, `most` in bytes of output. Raises
        TunesmithError when ssh itself fails, or the host says too much: the line says why and
        what to do.
        """
        try:
            done, began = execute(
                self.argv(), script, arguments, stdin=stdin, timeout=timeout, env=env, most=most
            )
        except FloodError as flood:
            raise self.flooded(flood) from None
        except subprocess.TimeoutExpired:
            raise TunesmithError(
                f"{self.name}: no end after {formats.duration(timeout)} on "
                f"{self.host.address}; the host is "
                "overloaded or the connection hangs",
                hint=f"`ssh {self.name} uptime` shows which",
            ) from None
        if done.returncode == SSH_FAILED:
            raise self.failure(done.stderr, began=began)
        return done

    def flooded(self, flood: FloodError) -> TunesmithError:
        """Return the error for a host that says more than an answer can have."""
        return TunesmithError(
            f"{self.name}: {self.host.address} sends {flood}; the rest was not read",
            hint=f"`ssh {self.name} true | head -c 300` shows how it begins",
        )

    def failure(self, stderr: str, *, began: bool = False) -> TunesmithError:
        """Return what ssh's own failure means, from its last words; `began`: it was at work."""
        jump = self.host.jump
        kind = "lost" if began else ssh_errors.kind_of(stderr, jump=jump is not None)
        said = ssh_errors.last_line(stderr)
        reason = ssh_errors.reason(kind, self.name, self.host.address, said, jump=jump)
        return reason.error([line for line in stderr.splitlines() if line.strip()][-3:])


class FloodError(Exception):
    """More came than an answer can have; the text says how much of what."""


def ssh_argv(config: Path, name: str) -> list[str]:
    """Return the start of an ssh command that asks nothing, up to and with the host's name."""
    words = ["-F", str(config), "-T", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]
    return ["ssh", *words, name, "--"]


def execute(
    argv: Sequence[str],
    script: str,
    arguments: Sequence[str] = (),
    *,
    stdin: str | None = None,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    ssh_env: Mapping[str, str] | None = None,
    most: int = MOST_OUTPUT,
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Feed `script` to /bin/sh through an ssh command; return also whether it began there.

    What start files of the login shell print is cut off. `ssh_env` is the environment of
    ssh itself (default: ours). Raises subprocess.TimeoutExpired, and FloodError when more
    than `most` bytes come.
    """
    mark = f"tunesmith {secrets.token_hex(8)}"
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in (env or {}).items())
    body = f"printf '%s\\n' '{mark}'\nexport LC_ALL=C\n{exports}(\n{script}\n)"
    words = "".join(f" {shlex.quote(word)}" for word in arguments)
    if stdin is None:
        # sh reads up to the parenthesis before it begins, and what the script starts cannot
        # eat the rest of it as its standard input.
        command = f"/bin/sh -s --{words}"
        sent = f"{body} </dev/null{_END}"
    else:
        # The script's bytes are counted (one at a time: dd must not read further); what
        # follows is the script's standard input.
        body += _END
        read = f'eval "$(dd bs=1 count={len(body.encode())} 2>/dev/null)"'
        command = f"/bin/sh -c {shlex.quote(read)} sh{words}"
        sent = body + stdin
    argv = [*argv, command]
    code, stdout, stderr = _converse(argv, sent.encode(), timeout, most, ssh_env)
    before, found, output = stdout.partition(f"{mark}\n")
    printed = output if found else before
    return subprocess.CompletedProcess(argv, code, printed, stderr), bool(found)


def _converse(
    argv: Sequence[str], sent: bytes, timeout: float, most: int, env: Mapping[str, str] | None
) -> tuple[int, str, str]:
    """Run a command that reads `sent`; return its exit code, output and errors."""
    ends = time.monotonic() + timeout
    # A file, not a pipe: the kept connection of older ssh holds on to its standard error.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=None if env is None else dict(env),
        )
        assert process.stdin is not None and process.stdout is not None
        # Beside the reading: a host that answers before it has read all must not block both.
        writer = threading.Thread(target=_feed, args=(process.stdin, sent), daemon=True)
        writer.start()
        try:
            output = _gather(process.stdout, errors, ends, most)
            code = process.wait(max(ends - time.monotonic(), 0.1))
        except TimeoutError:
            raise subprocess.TimeoutExpired(argv, timeout) from None
        finally:
            # Ctrl-C, a flood, no time left; else it has ended.
            process.kill()
            process.wait()
            writer.join(5)
            process.stdout.close()
        return code, output.decode(errors="replace"), last_words(errors)


def _gather(stdout: IO[bytes], errors: IO[bytes], ends: float, most: int) -> bytearray:
    """Return all that comes. Raises FloodError, or TimeoutError at `ends` (monotonic)."""
    output = bytearray()
    for piece in pieces(stdout, errors):
        output += piece
        if len(output) > most:
            raise FloodError(f"more than {formats.size(most)}")
        if time.monotonic() > ends:
            raise TimeoutError
    return output


def pieces(stdout: IO[bytes], errors: IO[bytes]) -> Iterator[bytes]:
    """Yield what comes, and nothing now and then while nothing comes, to the end.

    Raises FloodError when `errors`, a file, grows beyond what ssh and a script have to say.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        looked = time.monotonic()
        while True:
            ready = selector.select(timeout=_LOOK_SECONDS)
            if time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                if os.fstat(errors.fileno()).st_size > MOST_ERRORS:
                    raise FloodError(f"more than {formats.size(MOST_ERRORS)} of errors")
            if not ready:
                yield b""
                continue
            piece = os.read(stdout.fileno(), 1 << 18)
            if not piece:
                return
            yield piece


def last_words(errors: IO[bytes]) -> str:
    """Return the end of what was written into a file of errors."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(size - _KEPT_ERRORS, 0))
    return errors.read(_KEPT_ERRORS).decode(errors="replace")


def _feed(stdin: IO[bytes], sent: bytes) -> None:
    # Who ends before having read all says so by the exit code.
    with contextlib.suppress(OSError):
        stdin.write(sent)
    with contextlib.suppress(OSError):
        stdin.close()
