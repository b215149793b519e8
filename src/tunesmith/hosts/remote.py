"""A shell on a host of the inventory: one ssh exec a call, over a kept connection."""

from __future__ import annotations

import secrets
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.hosts import inventory as inventories
from tunesmith.hosts import reasons

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
    ) -> subprocess.CompletedProcess[str]:
        """Run a POSIX sh script there; return its exit code and output, whatever they are.

        (But 255 comes as 254: with 255 ssh itself fails.)
        `arguments` become $1, $2, ...; `env` and `stdin` travel inside the connection, so
        they may be secret. `timeout` is in seconds. Raises TunesmithError when ssh itself
        fails: the line says why and what to do.
        """
        try:
            done, began = execute(
                self.argv(), script, arguments, stdin=stdin, timeout=timeout, env=env
            )
        except subprocess.TimeoutExpired:
            raise TunesmithError(
                f"{self.name}: no end after {timeout:g} s on {self.host.address}; the host is "
                f"overloaded or the connection hangs: `ssh {self.name} uptime` shows which"
            ) from None
        if done.returncode == SSH_FAILED:
            raise self.failure(done.stderr, began=began)
        return done

    def failure(self, stderr: str, *, began: bool = False) -> TunesmithError:
        """Return what ssh's own failure means, from its last words; `began`: it was at work."""
        jump = self.host.jump
        kind = "lost" if began else reasons.kind_of(stderr, jump=jump is not None)
        said = reasons.last_line(stderr)
        text = reasons.message(kind, self.name, self.host.address, said, jump=jump)
        return TunesmithError(text, [line for line in stderr.splitlines() if line.strip()][-3:])


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
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Feed `script` to /bin/sh through an ssh command; return also whether it began there.

    What start files of the login shell print is cut off. `ssh_env` is the environment of
    ssh itself (default: ours). Raises subprocess.TimeoutExpired.
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
    # A file, not a pipe: the kept connection of older ssh holds on to its standard error.
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            [*argv, command],
            input=sent.encode(),
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=timeout,
            check=False,
            env=None if ssh_env is None else dict(ssh_env),
        )
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    before, found, output = done.stdout.decode(errors="replace").partition(f"{mark}\n")
    printed = output if found else before
    answer = subprocess.CompletedProcess(done.args, done.returncode, printed, stderr)
    return answer, bool(found)
