"""What ansible-playbook tells, event by event: progress, results, a log without secrets."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.documents import JsonObject
from tunesmith.core.printable import one_line, printable
from tunesmith.hosts import inventory as inventories
from tunesmith.hosts import ssh_errors

OUTPUT = "ansible.log"
EVENTS = "events.jsonl"

StepState = Literal["started", "ok", "changed", "skipped", "ignored", "failed", "unreachable"]

_ENDS: dict[str, StepState] = {
    "runner_on_ok": "ok",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
    "runner_on_skipped": "skipped",
}
# A password in an address, and Hugging Face's tokens.
_PASSWORD = re.compile(r"(://)[^/\s:@\"']+:[^/\s@\"']+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
# What Ansible says before ssh's own words.
_BEFORE_SSH = re.compile(r"^.*? (?:over|via) ssh: (?:ssh: )?", re.DOTALL)
_DETAIL_LINES = 8
# Characters of a message, and of a line of its detail.
_LONGEST = 2000


@dataclass(frozen=True)
class Step:
    """A task on a host has begun or ended; `seconds` is how long it took (0 at its start).

    `task` is the role and the task's name, `uuid` tells tasks of one name apart.
    """

    host: str
    task: str
    state: StepState
    seconds: float
    uuid: str


@dataclass(frozen=True)
class HostResult:
    """What became of one host: numbers of tasks, as Ansible counts them.

    `task` and `message` are of the task that ended it, `detail` the program's own words.
    `seconds` is the time from its first task to its last.
    """

    name: str
    ok: int = 0
    changed: int = 0
    skipped: int = 0
    failed: int = 0
    unreachable: int = 0
    task: str | None = None
    message: str | None = None
    detail: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the host came to the end of the play."""
        return self.message is None and not (self.failed or self.unreachable)


@dataclass(frozen=True)
class _Failure:
    task: str
    result: JsonObject
    unreachable: bool


class Recorder:
    """Takes ansible-runner's events; `log` gets them and the output, `progress` the steps.

    `pid` is ansible-playbook's, None before it spoke. `stats` is its recap, None before the
    end of the play.
    """

    def __init__(
        self,
        names: Sequence[str],
        log: Path,
        progress: Callable[[Step], None],
        secrets: Sequence[str],
    ) -> None:
        self._names = tuple(names)
        self._progress = progress
        self._secrets = tuple(secrets)
        self._output = (log / OUTPUT).open("w", encoding="utf-8")
        self._events = (log / EVENTS).open("w", encoding="utf-8")
        self._began = time.monotonic()
        self._started: dict[tuple[str, str], float] = {}
        self._spans: dict[str, tuple[float, float]] = {}
        self._failures: dict[str, _Failure] = {}
        self._broken: Exception | None = None
        self.pid: int | None = None
        self.stats: dict[str, dict[str, int]] | None = None
        self.last_lines: list[str] = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._output.close()
        self._events.close()

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return time.monotonic() - self._began

    def event(self, event: JsonObject) -> bool:
        """Take one event; False tells ansible-runner not to keep a file of its own of it."""
        # ansible-runner swallows what a handler raises: `check` raises it at the end.
        try:
            self._take(event)
        except (OSError, KeyError, TypeError, ValueError) as error:
            self._broken = self._broken or error
        return False

    def check(self) -> None:
        """Raise what went wrong while events were taken."""
        if self._broken is not None:
            raise self._broken

    def _take(self, event: JsonObject) -> None:
        self.pid = event.get("pid", self.pid)
        stdout = event.get("stdout")
        if text := printable(stdout if isinstance(stdout, str) else "").strip("\n"):
            text = self.scrubbed(text)
            self._output.write(f"{text}\n")
            self._output.flush()
            self.last_lines = [*self.last_lines, *text.splitlines()][-_DETAIL_LINES:]
        kept = {key: event[key] for key in ("created", "event", "event_data") if key in event}
        self._events.write(self.scrubbed(json.dumps(kept, ensure_ascii=False)) + "\n")
        self._events.flush()
        data = event.get("event_data") or {}
        if event["event"] == "playbook_on_stats":
            self.stats = {key: value for key, value in data.items() if isinstance(value, dict)}
        elif event["event"] == "runner_on_start":
            self._step(data, "started")
        elif event["event"] in _ENDS:
            self._ended(data, _ENDS[event["event"]])

    def _ended(self, data: JsonObject, state: StepState) -> None:
        # A module's answer, which the host makes.
        result = data.get("res")
        result = result if isinstance(result, dict) else {}
        if state == "ok" and result.get("changed"):
            state = "changed"
        if state == "failed" and data.get("ignore_errors"):
            state = "ignored"
        if state in ("failed", "unreachable"):
            failure = _Failure(_task(data), result, state == "unreachable")
            self._failures[data["host"]] = failure
        self._step(data, state)

    def _step(self, data: JsonObject, state: StepState) -> None:
        now, key = self.seconds, (data["host"], data["task_uuid"])
        began = self._started.setdefault(key, now)
        first = self._spans.get(data["host"], (began, now))[0]
        self._spans[data["host"]] = (first, now)
        self._progress(Step(data["host"], _task(data), state, now - began, data["task_uuid"]))

    def scrubbed(self, text: str) -> str:
        """Return `text` without secrets: those given, and what looks like one."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _TOKEN.sub("hf_***", _PASSWORD.sub(r"\1***@", text))

    def results(self, inventory: Path) -> tuple[HostResult, ...]:
        """Return what became of each host."""
        return tuple(self._result(name, inventory) for name in self._names)

    def _result(self, name: str, inventory: Path) -> HostResult:
        stats = self.stats or {}
        first, last = self._spans.get(name, (0.0, 0.0))
        failure = self._failures.get(name)
        failed = stats.get("failures", {}).get(name, 0)
        unreachable = stats.get("dark", {}).get(name, 0)
        task = message = None
        detail: tuple[str, ...] = ()
        if self.stats is None:
            message = "interrupted; run the same command again to continue"
        elif name not in stats.get("processed", {}):
            message = "no task was run on it"
        elif failed or unreachable:
            # A failure that a rescue block answered is among the failures, not in the recap.
            found = failure or _Failure("?", {}, bool(unreachable))
            task = found.task
            message = self.scrubbed(_message(name, found, inventory))
            detail = tuple(map(self.scrubbed, _detail(found.result)))
        return HostResult(
            name=name,
            ok=stats.get("ok", {}).get(name, 0),
            changed=stats.get("changed", {}).get(name, 0),
            skipped=stats.get("skipped", {}).get(name, 0),
            failed=failed,
            unreachable=unreachable,
            task=task,
            message=message,
            detail=detail,
            seconds=last - first,
        )


def _task(data: JsonObject) -> str:
    role, name = data.get("role"), str(data.get("task") or data.get("task_action") or "?")
    return one_line(f"{role}: {name}" if role else name)


def _message(name: str, failure: _Failure, inventory: Path) -> str:
    """Return why a host ended, in one line."""
    result = _first_failed(failure.result)
    text = result.get("msg") or result.get("censored") or result.get("reason") or ""
    text = " ".join(map(str, text)) if isinstance(text, list) else str(text)
    if failure.unreachable:
        said = _BEFORE_SSH.sub("", text)
        kind = ssh_errors.kind_of(said)
        if kind != "unknown":
            where = inventories.find(inventory, name).address
            return ssh_errors.reason(kind, name, where, ssh_errors.last_line(said)).line
    if text in ("", "non-zero return code"):
        text = ": ".join([f"exit code {result.get('rc', 'unknown')}", *_detail(result)[-1:]])
    if text == "Error executing command.":
        command = result.get("cmd", "")
        text = f"{command if isinstance(command, str) else ' '.join(command)}: cannot be started"
    return one_line(text, _LONGEST)


def _detail(result: JsonObject) -> list[str]:
    result = _first_failed(result)
    for key in ("stderr", "module_stderr", "stdout", "module_stdout"):
        said = str(result.get(key) or "")[-_DETAIL_LINES * _LONGEST :]
        if lines := [line for line in map(_line, said.splitlines()) if line]:
            return lines[-_DETAIL_LINES:]
    return []


def _line(text: str) -> str:
    return printable(text[:_LONGEST]).rstrip()


def _first_failed(result: JsonObject) -> JsonObject:
    """Return the item that failed, of a task that loops; else the result itself."""
    items = result.get("results")
    if isinstance(items, list):
        return next((i for i in items if isinstance(i, dict) and i.get("failed")), result)
    return result
