"""The client of tunesmith.job.agent: what is asked of a host about its runs.

One SSH command a question, over the kept connection; `watch` is one command that goes on
printing. The agent speaks JSON, one object a line; what start files print beside it is
passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.hosts import reasons
from tunesmith.hosts.layout import FIND_BASE, FIND_ENVIRONMENT, not_provisioned
from tunesmith.hosts.remote import SSH_FAILED, Remote

# Exit status of our script when there is nothing to ask.
_NOT_PROVISIONED = 96
_SCRIPT = f"""{FIND_BASE}
[ -n "$base" ] || exit {_NOT_PROVISIONED}
{FIND_ENVIRONMENT}
[ -n "$environment" ] || exit {_NOT_PROVISIONED}
. "$base/env.sh" || exit 1
mkdir -p "$base/runs" && cd "$base" || exit 1
exec "$environment/bin/python" -I -m tunesmith.job.agent --runs "$base/runs" "$@"
"""
# Commands about runs, in what a host says.
_COMMAND = re.compile(r"(`inv (?:attach|stop|resume|runs|train|logs|merge|predict|chat|rm)\b)")
# The agent gives a sign of life every 3 s; a host that is silent for so long is out of reach.
_SILENT_SECONDS = 10.0
# Why ssh failed, where trying again cannot help.
_FINAL: tuple[reasons.Kind, ...] = ("wrong_key", "changed", "unpinned", "moved", "unknown")


def call(
    remote: Remote, verb: str, *words: str, stdin: Any = None, timeout: float = 60
) -> dict[str, Any]:
    """Ask the agent once; return its last line.

    `stdin` is sent as JSON. Raises what the agent refused with, or TunesmithError when the
    host is out of reach.
    """
    text = None if stdin is None else json.dumps(stdin, ensure_ascii=False)
    done = remote.run(_SCRIPT, arguments=(verb, *words), stdin=text, timeout=timeout)
    if done.returncode == _NOT_PROVISIONED:
        raise not_provisioned(remote.name)
    lines = [value for line in done.stdout.splitlines() if (value := _parse(line)) is not None]
    if done.returncode != 0 or not lines:
        raise _refused(remote, verb, done.returncode, lines, done.stderr)
    return _addressed(lines[-1], remote.name)


def stream(remote: Remote, verb: str, *words: str, fresh: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the agent's lines as they come, until it ends.

    `fresh` makes a connection of its own, since a kept one may hang. Raises Lost when the
    host is out of reach, and what the agent refused with.
    """
    options = ["-o", "ControlPath=none"] if fresh else []
    argv = remote.argv("/bin/sh", "-c", _SCRIPT, "sh", verb, *words)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [argv[0], *options, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            for line in _lines(process, f"{remote.name} was silent for {_SILENT_SECONDS:.0f} s"):
                if (value := _parse(line)) is not None:
                    lines = [value]
                    if "error" not in value:
                        yield _addressed(value, remote.name)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    if code == _NOT_PROVISIONED:
        raise not_provisioned(remote.name)
    if code in (SSH_FAILED, -9):
        kind = reasons.kind_of(stderr, jump=remote.host.jump is not None)
        # Without a word of ssh the connection was cut: it may be back in a moment.
        if kind in _FINAL and stderr.strip():
            raise remote.failure(stderr)
        said = reasons.last_line(stderr)
        what = "does not answer" if kind in ("off", "blocked", "jump") else "was lost"
        raise LostError(f"{remote.name} {what} ({said})")
    if code != 0:
        raise _refused(remote, verb, code, lines, stderr)


class LostError(TunesmithError):
    """The host is out of reach for now; what runs there goes on."""


def _lines(process: subprocess.Popen[bytes], silent: str) -> Iterator[str]:
    """Yield whole lines; raise LostError after a long silence."""
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        heard = time.monotonic()
        while True:
            if not selector.select(timeout=1.0):
                if time.monotonic() - heard > _SILENT_SECONDS:
                    raise LostError(silent)
                continue
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                return
            heard = time.monotonic()
            *whole, pending = (pending + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)


def _parse(line: str) -> dict[str, Any] | None:
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            return value if isinstance(value, dict) else None
    return None


def addressed(text: str, name: str) -> str:
    """Return a text of a host's with the host named in its commands: there, `inv attach` is
    about the runs that are there."""
    return _COMMAND.sub(rf"\1 --on {name}", text)


def _addressed(said: dict[str, Any], name: str) -> dict[str, Any]:
    status = said.get("status")
    if isinstance(status, dict) and isinstance(status.get("message"), str):
        status["message"] = addressed(status["message"], name)
    return said


def _refused(
    remote: Remote, verb: str, code: int, lines: Sequence[dict[str, Any]], stderr: str
) -> TunesmithError:
    if lines and "error" in lines[-1]:
        kind = UsageError if code == UsageError.exit_code else TunesmithError
        detail = [addressed(str(line), remote.name) for line in lines[-1].get("detail", ())]
        return kind(addressed(str(lines[-1]["error"]), remote.name), detail)
    if "No module named" in stderr or "invalid choice" in stderr:
        return UsageError(
            f"{remote.name} has an older tunesmith; `inv provision --on {remote.name}` brings "
            "this one"
        )
    return TunesmithError(
        f"{remote.name}: {verb} failed there with exit code {code}", stderr.splitlines()[-5:]
    )
