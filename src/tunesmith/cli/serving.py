"""A web service of a target: started, made reachable here, and kept until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from tunesmith.cli.console import say, telling
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import replacing
from tunesmith.job.services.manager import http_status
from tunesmith.project import Project
from tunesmith.services import service
from tunesmith.services.service import Body, Kind, ServiceAccess, Services, ServiceState
from tunesmith.services.tunnel import Tunnel, free_port, reopen
from tunesmith.targets import factory
from tunesmith.targets.capability import require

# How often it is asked whether the service lives, in seconds.
_LOOK_SECONDS = 10.0
_ANSWER_SECONDS = 30.0


class _HangupError(Exception):
    """The terminal is gone: the tunnel ends, the service stays."""


def destination(
    project: Project, on: str, kind: Kind, port: int, *, stop: bool, dry: bool
) -> tuple[ServiceAccess, int | None]:
    """Return where to serve, and on which local port; None: it was stopped, or only told."""
    target = require(factory.target_of(project, on, say), Services)
    access = target.services(ending=stop)
    if stop:
        _stop(access, kind, dry=dry)
        return access, None
    local = _local_port(access, kind, port)
    if dry:
        _tell_plan(access, kind, local)
        return access, None
    return access, local


def serve(
    access: ServiceAccess,
    kind: Kind,
    body: Body,
    local: int,
    *,
    opener: Path | None = None,
    show_key: bool = False,
) -> None:
    """Start a service, open the way to it, and stay until Ctrl-C.

    `opener` is the file by which a browser is sent there; None: none is opened.
    """
    way: Tunnel | None = None
    # One for the address that is told, one for the browser that is opened.
    wanted = (1 + (opener is not None)) if kind.browsed else 0
    tokens = [service.new_secret() for _ in range(wanted)]
    try:
        with telling() as tell:
            said = service.start(access, kind, {**body, "tokens": tokens}, tell)
        there = int(said["port"])
        if access.remote is not None:
            way = Tunnel(access.remote, there, local)
            way.open()
        here = way.here if way else there
        _wait_for_answer(access, kind, here, said.get("key"))
        url = f"http://127.0.0.1:{here}"
        told, *for_browser = [f"{url}/?token={token}" for token in tokens] or [url]
        say(f"{access.name}: {kind.title} is at {told}")
        _tell_more(access, kind, url, said, show_key=show_key)
        if opener is not None:
            _open(opener, for_browser[0])
        _stay(access, kind, way)
    except KeyboardInterrupt:
        if way is not None:
            way.close()
        _leave(access, kind)
    finally:
        if way is not None:
            way.close()
        if opener is not None:
            opener.unlink(missing_ok=True)


def browser_file(project: Project, kind: Kind, *, browser: bool) -> Path | None:
    """Return the file by which a browser is opened, or None where nobody looks at one."""
    if not browser or not sys.stdout.isatty():
        return None
    return project.home / "services" / f"open-{kind.name}-{os.getpid()}.html"


def _open(file: Path, address: str) -> None:
    """Send a browser to an address with a token, by a file that only we can read: the words a
    browser is started with are seen by every user of the machine."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(file) as part:
        part.chmod(0o600)  # before there is anything in it
        part.write_text(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">\n',
            encoding="utf-8",
        )
    webbrowser.open(file.as_uri())


def _wait_for_answer(access: ServiceAccess, kind: Kind, port: int, key: str | None) -> None:
    deadline = time.monotonic() + _ANSWER_SECONDS
    status = http_status(port, kind.path, key)
    while status != 200 and time.monotonic() < deadline:
        time.sleep(0.25)
        status = http_status(port, kind.path, key)
    if status != 200:
        found = "nothing" if status is None else f"HTTP {status}"
        raise TunesmithError(
            f"{access.name}: {kind.title} answers there, but {found} comes from 127.0.0.1:{port} "
            "here",
            hint=f"`inv {kind.name} --on {access.name}` tries again",
        )


def _tell_more(
    access: ServiceAccess, kind: Kind, url: str, said: ServiceState, *, show_key: bool
) -> None:
    if said.get("key") is None:
        say(
            f"it was started by an earlier version, and opens to anybody who reaches its port: "
            f"end it (`inv {kind.name} --on {access.name} --stop`) and start it again"
        )
    elif kind.browsed:
        say("the address works once, for one browser; the same command gives another")
    if kind.name == "webui":
        say(f"data {access.folders.data}, trainings of the Board {access.folders.base / 'board'}")
    if kind.name == "api":
        serves = said["serves"]
        say(f"model {serves['run']} ({serves['what']})")
        if show_key or not said["reused"]:
            say(f"export API_KEY={said['key']}")
        else:
            say(f"the key was told at the start; `inv api --on {access.name} --show-key` tells it")
        # By a pipe: what curl is started with is seen by every user of the machine.
        say(
            'printf "Authorization: Bearer %s" "$API_KEY" | curl -H @- -H "Content-Type: '
            f'application/json" {url}/v1/chat/completions -d \'{{"model": "{serves["run"]}", '
            '"messages": [{"role": "user", "content": "Hello"}]}\''
        )
    ends = "tunnel and service" if access.remote else "the service"
    stays = "; a training started in it goes on" if kind.name == "webui" else ""
    say(f"Ctrl-C ends {ends}{stays}")


def _stay(access: ServiceAccess, kind: Kind, way: Tunnel | None) -> None:
    """Keep the tunnel, and return only by an exception: Ctrl-C, or the service's end."""
    looked = time.monotonic()
    while True:
        if way is not None and not way.alive():
            reopen(way, say)
            looked = 0.0  # the host may have been started anew: look at once
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            _check_alive(access, kind)
        time.sleep(0.5)


def _check_alive(access: ServiceAccess, kind: Kind) -> None:
    """Raise TunesmithError when the service has ended."""
    try:
        said = access.ask("wait", kind.name)
    except TunesmithError:
        if access.remote is None:
            raise
        return  # a host out of reach is the tunnel's affair, and it says so
    if said["state"] == "absent":
        raise TunesmithError(
            f"{access.name}: {kind.title} was ended from elsewhere",
            hint=f"`inv {kind.name} --on {access.name}` starts it again",
        )
    if said["state"] == "ended":
        raise service.ended(access, kind, said, "ended")


def _leave(access: ServiceAccess, kind: Kind) -> None:
    """After Ctrl-C: end the service, unless a training runs in it."""
    try:
        said = access.ask("stop", kind.name)
    except TunesmithError as error:
        raise TunesmithError(
            f"{access.name}: {kind.title} may still run there",
            [error.line],
            hint=f"`inv {kind.name} --on {access.name} --stop` ends it",
        ) from None
    if said["state"] == "kept":
        say(f"{access.name}: {kind.title} trains {service.folder_of_training(said)}, so it stays")
        say(f"come back: `inv {kind.name} --on {access.name}`")
        say(f"end it and the training: `inv {kind.name} --on {access.name} --stop`")
    else:
        say(f"{access.name}: {kind.title} is ended")


def _stop(access: ServiceAccess, kind: Kind, *, dry: bool) -> None:
    if dry:
        say(f"would end {kind.title} of {access.name}")
        return
    said = access.ask("stop", kind.name, "--force")
    if said["state"] == "absent":
        say(f"{access.name}: {kind.title} does not run")
        return
    say(f"{access.name}: {kind.title} is ended")
    if folder := service.folder_of_training(said):
        say(f"its training in {folder} was ended too; checkpoints stay there")


def _local_port(access: ServiceAccess, kind: Kind, port: int) -> int:
    """Return the local end of the tunnel. Without a tunnel the target chooses the port."""
    if access.remote is None:
        if port:
            raise UsageError(f"--port {port}: only a host's service has a port of its own here")
        return 0
    return free_port(port or None, kind.port)


def _tell_plan(access: ServiceAccess, kind: Kind, local: int) -> None:
    say(f"would start {kind.title} on {access.name}, on its loopback, below {access.folders.base}")
    if access.remote is not None:
        say(f"would forward 127.0.0.1:{local} of this machine to it")


def reporter_of(access: ServiceAccess) -> OnText:
    return lambda text: say(f"{access.name}: {text}")


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """SIGTERM is Ctrl-C; a terminal that is closed leaves the service alone."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def hang_up(_number: int, _frame: object) -> None:
        raise _HangupError

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, interrupt)
    # Under nohup it is ignored, and stays so.
    if before[signal.SIGHUP] is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    except _HangupError:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
