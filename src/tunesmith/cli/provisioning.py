"""`inv provision`, `host.verify` and `host.reset`: the work, shown host by host."""

from __future__ import annotations

import getpass
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from tunesmith.cli.console import console, moving, say
from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.progress import Display, Row
from tunesmith.hosts import inventory
from tunesmith.project import Project
from tunesmith.provision.drift import State, check_reach, check_states, fingerprint, wanted_of
from tunesmith.provision.events import HostResult, Step
from tunesmith.provision.playbook import Provisioned, ProvisionOptions
from tunesmith.provision.playbook import provision as run_playbook
from tunesmith.provision.playbook import reset as run_reset
from tunesmith.targets import factory

# Lines of drift shown; a lost environment would have hundreds.
_SHOWN = 10
_TOKEN = re.compile(r"^[A-Za-z0-9_-]{8,}$")


def provision(
    root: Path,
    on: str,
    *,
    mirror: str = "default",
    flavour: str | None = None,
    toolkit: bool = False,
    token: bool = False,
    check: bool = False,
    diff: bool = False,
    full: bool = False,
    dry: bool = False,
) -> None:
    """Bring hosts (comma-separated) to the stack; `full` runs the playbook in any case.

    With `token`, a Hugging Face token is read from stdin. Raises TunesmithError when a host
    failed; the others were done.
    """
    project = Project.at(root)
    names = host_names(on)
    if boxed := containers_of(project, names):
        if toolkit or token or check or diff:
            raise UsageError(
                f"{boxed[0]} runs jobs in a container",
                hint="--toolkit, --token, --check and --diff are for conda; leave them out",
            )
        if not dry:
            _provision_containers(project, boxed, mirror=mirror, flavour=flavour)
        else:
            say(f"would make the container of {', '.join(boxed)}")
        names = tuple(name for name in names if name not in boxed)
        if not names:
            return
    profile = project.mirror(mirror)
    wanted = wanted_of(project, profile, flavour=flavour, toolkit=toolkit)
    if dry:
        say(f"would bring {', '.join(names)} to {fingerprint(wanted)}")
        say("playbook: ansible/playbooks/provision.yml, for hosts that are not in state")
        return
    secret = _read_token() if token else None
    began = time.monotonic()
    with moving(f"looking at {', '.join(names)}"):
        states = check_states(project, names, wanted)
    playbook_anyway = full or check or token
    for state in states:
        _tell_state(state, playbook_anyway)
    todo = [s.name for s in states if not s.error and (playbook_anyway or not s.in_state)]
    done = None
    if todo:
        asked = ProvisionOptions(
            mirror=mirror,
            flavour=flavour,
            toolkit=toolkit,
            token=secret,
            check=check,
            diff=diff,
            distrusted={state.name: state.distrusted for state in states if state.distrusted},
        )
        with Display(console) as display:
            done = run_playbook(project, todo, asked, _Steps(display).step)
    if todo or len(states) > 1:
        _table(states, done, time.monotonic() - began, check=check)
    _raise_failed(states, done)


def _provision_containers(
    project: Project, names: Sequence[str], *, mirror: str, flavour: str | None
) -> None:
    from tunesmith.provision import container

    for name in names:
        with moving(f"{name}: making its container"):
            container.provision(project, name, say, mirror=mirror, flavour=flavour)


def containers_of(project: Project, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the hosts whose jobs run in a container of the image."""
    hosts = inventory.read(project.inventory)
    return tuple(n for n in names if n in hosts and hosts[n].runner == "container")


def host_verify(root: Path, on: str) -> None:
    """Test what provisioning promises, promise by promise. Raises when one does not hold."""
    from tunesmith.hosts.verify import verify

    project = Project.at(root)
    broken = []
    if boxed := containers_of(project, host_names(on)):
        raise UsageError(
            f"{boxed[0]} runs jobs in a container of the image",
            hint="`inv image.verify` tests the image",
        )
    for name in host_names(on):
        with moving(f"{name}: testing what provisioning promises"):
            verified = verify(project, name)
        for promise in verified.promises:
            say(f"{promise.outcome:<8} {promise.text}")
            if promise.why:
                say(f"         {promise.why}")
        counts = ", ".join(
            f"{verified.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")
        )
        say(f"{name}: {counts} in {formats.duration(verified.seconds)}")
        broken += [] if verified.good else [name]
    if broken:
        raise TunesmithError(
            f"{', '.join(broken)}: not as provisioning leaves a host",
            hint=f"`inv provision --on {','.join(broken)} --full` repairs it",
        )


def host_reset(root: Path, on: str, *, dry: bool = False) -> None:
    """Remove from hosts what provisioning installed. Raises when a host failed."""
    project = Project.at(root)
    names = host_names(on)
    if dry:
        say(f"would remove the environment, caches and start-file lines of {', '.join(names)}")
        say("kept: data, base models, runs, HF_HOME")
        return
    for name in containers_of(project, names):
        from tunesmith.provision import container

        container.reset(project, name, say)
        names = tuple(other for other in names if other != name)
    # Before Ansible: it takes seconds to say what ssh says at once.
    with moving(f"looking at {', '.join(names)}"):
        lost = [state for state in check_reach(project, names) if state.error]
    todo = [name for name in names if name not in {state.name for state in lost}]
    done = None
    if todo:
        with Display(console) as display:
            done = run_reset(project, todo, _Steps(display).step)
        _table(lost, done, done.seconds)
    _raise_failed(lost, done)


def host_names(on: str) -> tuple[str, ...]:
    """Return the hosts of a comma-separated list, each once."""
    names = tuple(dict.fromkeys(filter(None, map(str.strip, on.split(",")))))
    if not names:
        raise UsageError("--on is empty", hint="name a host, or several: gpu1,gpu2")
    local = [name for name in names if name in factory.TARGETS]
    if local:
        raise UsageError(
            f"--on {local[0]}: only a host can be provisioned",
            hint="`inv host.list` shows the hosts you know",
        )
    return names


def _read_token() -> str:
    """Read a token from stdin, or ask for it without echo on a terminal."""
    text = getpass.getpass("Hugging Face token: ") if sys.stdin.isatty() else sys.stdin.read()
    if not _TOKEN.match(text.strip()):
        # Not repeated: it may be a token with a typing error.
        raise UsageError(
            "stdin holds no token",
            hint="it takes one word: `inv provision --on gpu1 --token` < FILE",
        )
    return text.strip()


def _tell_state(state: State, anyway: bool) -> None:
    if state.error:
        say(state.error.render())
        return
    if state.in_state:
        going_on = "; the playbook runs as asked" if anyway else ""
        say(f"{state.name}: in state ({state.base}, {formats.duration(state.seconds)}){going_on}")
        return
    say(f"{state.name}: {len(state.drift)} {'things' if len(state.drift) > 1 else 'thing'} to do")
    for line in state.drift[:_SHOWN]:
        say(f"  {line}")
    if len(state.drift) > _SHOWN:
        say(f"  and {len(state.drift) - _SHOWN} more")


def _table(
    states: Iterable[State], done: Provisioned | None, seconds: float, *, check: bool = False
) -> None:
    table = Table("host", "result", "ok", "changed", "skipped", "time", box=None, pad_edge=False)
    results = {host.name: host for host in done.hosts} if done else {}
    for state in states:
        if state.name not in results:
            word = "in state" if state.error is None else "not reached"
            table.add_row(state.name, word, "", "", "", formats.duration(state.seconds))
    interrupted = done is not None and done.interrupted
    for host in results.values():
        numbers = (str(host.ok), str(host.changed), str(host.skipped))
        word = "interrupted" if interrupted else _word(host, check)
        table.add_row(host.name, word, *numbers, formats.duration(host.seconds))
    console.print(table)
    if done:
        say(f"log: {done.log}")
    say(f"all in {formats.duration(seconds)}")


def _word(host: HostResult, check: bool) -> str:
    if host.unreachable:
        return "not reached"
    if not host.good:
        return "failed"
    if check:
        return "would change" if host.changed else "nothing to change"
    return "changed" if host.changed else "nothing to change"


def _raise_failed(states: Iterable[State], done: Provisioned | None) -> None:
    if done and done.interrupted:
        raise TunesmithError("interrupted", hint="the same command resumes where it stopped")
    lines: list[tuple[str, str, tuple[str, ...]]] = [
        (state.name, state.error.line, ()) for state in states if state.error
    ]
    hosts = done.hosts if done else ()
    for host in hosts:
        if not host.good:
            where = f"{host.task}: " if host.task and not host.unreachable else ""
            text = str(host.message).removeprefix(f"{host.name}: ")
            lines.append((host.name, f"{host.name}: {where}{text}", host.detail))
    if not lines:
        return
    total = len({host.name for host in hosts} | {state.name for state in states})
    if len(lines) == total == 1:
        raise TunesmithError(lines[0][1], _without_repeats(lines[0][2], lines[0][1]))
    raise TunesmithError(
        f"{len(lines)} of {total} hosts failed: {', '.join(name for name, _, _ in lines)}",
        [line for _, first, rest in lines for line in (first, *_without_repeats(rest, first))],
    )


def _without_repeats(lines: Sequence[str], said: str) -> list[str]:
    return [f"  {line.strip()}" for line in lines if line.strip() not in said]


class _Steps:
    """A row a host, with its task; what was changed and what failed stays as a line."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._rows: dict[str, Row] = {}

    def step(self, step: Step) -> None:
        """Show that a task has begun or ended."""
        if step.host not in self._rows:
            self._rows[step.host] = self._display.row(step.host)
        row, what = self._rows[step.host], f"{step.host}: {step.task}"
        if step.state == "started":
            row.doing(what)
            return
        row.rest(step.host)
        if step.state in ("changed", "failed", "unreachable"):
            self._display.say(f"{what}: {step.state} ({formats.duration(step.seconds)})")
