"""The client of tunesmith.job.supervisor.agent: what is asked of a host about its runs.

One SSH command a question, over the kept connection; `watch` is one command that goes on
printing. The agent speaks JSON, one object a line; what start files print beside it is
passed over. Each answer has a shape (hosts/replies.py); one that has not is refused.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any, TypeVar

from tunesmith.core import formats
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts import replies, ssh_errors
from tunesmith.hosts.answers import AnswerSource, MalformedError, parse_json
from tunesmith.hosts.layout import not_provisioned
from tunesmith.hosts.remote import (
    MOST_OUTPUT,
    SSH_FAILED,
    FloodError,
    Remote,
    last_words,
    pieces,
)
from tunesmith.job.run.replies import Refusal, RunShown, RunSnapshot

T = TypeVar("T")

# Exit status of our script when there is nothing to ask.
_NOT_PROVISIONED = 96
_SCRIPT = f"""
find_provisioned
base=$provisioned
[ -n "$base" ] || exit {_NOT_PROVISIONED}
find_environment
[ -n "$environment" ] || exit {_NOT_PROVISIONED}
. "$base/env.sh" || exit 1
mkdir -p "$base/runs" && cd "$base" || exit 1
exec "$environment/bin/python" -I -m tunesmith.job.supervisor.agent --runs "$base/runs" "$@"
"""
# Commands about runs, in what a host says.
_COMMAND = re.compile(r"(`inv (?:attach|stop|resume|runs|train|logs|merge|predict|chat|rm)\b)")
# The agent gives a sign of life every 3 s; a host that is silent for so long is out of reach.
_SILENT_SECONDS = 10.0
# Characters of one line; a list of 10^5 files of a run is such a line.
_LONGEST = 64 << 20
# What an agent says that does not know what it is asked.
_OLDER = ("No module named", "invalid choice", "unrecognized arguments")
# Why ssh failed, where trying again cannot help.
_FINAL: tuple[ssh_errors.Kind, ...] = ("wrong_key", "changed", "unpinned", "moved", "unknown")


def script() -> str:
    """Return the shell script that finds the agent and runs it; its arguments are the agent's."""
    # Here, as in layout.py: what runs on this machine has no need of it.
    from tunesmith.hosts.probe.script import with_places

    return with_places(_SCRIPT)


def call(
    remote: Remote,
    verb: str,
    *words: str,
    reply: type[T],
    stdin: Any = None,
    timeout: float = 60,
    most: int = MOST_OUTPUT,
) -> T:
    """Ask the agent once; return its last line as a `reply` (job/run/replies.py).

    `stdin` is sent as JSON, `most` is in bytes. Raises what the agent refused with, or
    TunesmithError when the host is out of reach or its answer is none.
    """
    text = None if stdin is None else json.dumps(stdin, ensure_ascii=False)
    done = remote.run(script(), arguments=(verb, *words), stdin=text, timeout=timeout, most=most)
    if done.returncode == _NOT_PROVISIONED:
        raise not_provisioned(remote.name)
    asked = AnswerSource(remote.name, f"its answer to `{verb}`")
    lines = [line for line in done.stdout.split("\n") if line.startswith("{")]
    # The last one is the answer; before it come signs of life, and what start files print.
    value = next((v for line in reversed(lines) if (v := _parse(asked, line)) is not None), None)
    if done.returncode != 0 or value is None:
        raise _refused(remote, verb, done.returncode, value, done.stderr)
    return _addressed(replies.read(asked, reply, value), remote.name)


def watch(remote: Remote, *words: str, fresh: bool = False) -> Iterator[RunSnapshot]:
    """Yield what the agent says of a run as it comes, until it ends.

    `fresh` makes a connection of its own, since a kept one may hang. Raises Lost when the
    host is out of reach, and what the agent refused with.
    """
    options = ["-o", "ControlPath=none"] if fresh else []
    verb = "watch"
    argv = remote.argv("/bin/sh", "-c", script(), "sh", verb, *words)
    asked = AnswerSource(remote.name, f"its answer to `{verb}`")
    last: JsonObject | None = None
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [argv[0], *options, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            for line in _lines(process, errors, remote.name):
                if (value := _parse(asked, line)) is not None:
                    last = value
                    if "error" not in value:
                        yield _addressed(replies.read(asked, RunSnapshot, value), remote.name)
            code = process.wait()
        except FloodError as flood:
            raise remote.flooded(flood) from None
        finally:
            process.kill()
            process.wait()
        stderr = last_words(errors)
    if code == _NOT_PROVISIONED:
        raise not_provisioned(remote.name)
    if code in (SSH_FAILED, -9):
        kind = ssh_errors.kind_of(stderr, jump=remote.host.jump is not None)
        # Without a word of ssh the connection was cut: it may be back in a moment.
        if kind in _FINAL and stderr.strip():
            raise remote.failure(stderr)
        word = ssh_errors.last_line(stderr)
        what = "does not answer" if kind in ("off", "blocked", "jump") else "was lost"
        raise LostError(f"{remote.name} {what} ({word})")
    if code != 0:
        raise _refused(remote, verb, code, last, stderr)


class LostError(TunesmithError):
    """The host is out of reach for now; what runs there goes on."""


def _lines(process: subprocess.Popen[bytes], errors: IO[bytes], name: str) -> Iterator[str]:
    """Yield whole lines that may be an answer.

    Raises LostError after a long silence, FloodError for a line without end, and where so much
    comes without an answer.
    """
    assert process.stdout is not None
    pending = bytearray()
    heard, idle = time.monotonic(), 0
    for piece in pieces(process.stdout, errors):
        if not piece:
            if time.monotonic() - heard > _SILENT_SECONDS:
                raise LostError(f"{name} was silent for {formats.duration(_SILENT_SECONDS)}")
            continue
        heard = time.monotonic()
        idle += len(piece)
        pending += piece
        if b"\n" in piece:
            *whole, rest = bytes(pending).split(b"\n")
            pending = bytearray(rest)
            answers = [line for line in whole if line.startswith(b"{")]
            idle = len(rest) if answers else idle
            yield from (line.decode(errors="replace") for line in answers)
        if idle > MOST_OUTPUT:
            raise FloodError(f"more than {formats.size(MOST_OUTPUT)} without an answer in it")


def _parse(asked: AnswerSource, line: str) -> JsonObject | None:
    """Return an object that the agent has said; None for a line of somebody else's.

    Raises TunesmithError for one that cannot be read within bounds.
    """
    if not line.startswith("{"):
        return None
    try:
        value = parse_json(asked, line, _LONGEST)
    except MalformedError:
        return None
    return value if isinstance(value, dict) else None


def addressed(text: str, name: str) -> str:
    """Return a text of a host's with the host named in its commands: there, `inv attach` is
    about the runs that are there."""
    return _COMMAND.sub(rf"\1 --on {name}", text)


def _addressed(reply: T, name: str) -> T:
    if isinstance(reply, RunSnapshot | RunShown) and reply.status.message:
        status = replace(reply.status, message=addressed(reply.status.message, name))
        return replace(reply, status=status)
    return reply


def _refused(
    remote: Remote, verb: str, code: int, value: JsonObject | None, stderr: str
) -> TunesmithError:
    said = stderr if value is None else str(value.get("error"))
    if any(words in said for words in _OLDER):
        return UsageError(
            f"{remote.name} runs an older tunesmith",
            hint=f"update it with `inv provision --on {remote.name}`",
        )
    if value is not None and "error" in value:
        refusal = replies.read(
            AnswerSource(remote.name, f"its refusal of `{verb}`"), Refusal, value
        )
        kind = UsageError if code == UsageError.exit_code else TunesmithError
        error, hint, *detail = (
            addressed(text, remote.name) for text in (refusal.error, refusal.hint, *refusal.detail)
        )
        return kind(error, detail, hint=hint)
    return TunesmithError(
        f"{remote.name}: {verb} failed there with exit code {code}", stderr.splitlines()[-5:]
    )
