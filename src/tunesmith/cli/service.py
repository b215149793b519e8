"""What tasks.py calls for the web services: start, show the way in, and stay until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import webbrowser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.cli.console import say
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import replacing
from tunesmith.hosts.remote import Remote
from tunesmith.job.services.manager import http_status
from tunesmith.project import Project
from tunesmith.services import service
from tunesmith.services.service import KINDS, Kind, Place
from tunesmith.services.tunnel import Tunnel, free_port, reopen

# How often it is asked whether the service lives, in seconds.
_LOOK_SECONDS = 10.0
_ANSWER_SECONDS = 30.0


class _HangupError(Exception):
    """The terminal is gone: the tunnel ends, the service stays."""


def webui(root: Path, on: str, *, port: int, browser: bool, stop: bool, dry: bool) -> None:
    """Open LLaMA Board on a target."""
    project, kind = Project.at(root), KINDS["webui"]
    place, local = _asked(project, on, kind, port, stop=stop, dry=dry)
    if local is None:
        return
    with _signals():
        body = service.asked_of(place, kind, datasets=place.bring_data(_teller(place)))
        _serve(place, kind, body, local, opener=_opener(project, kind, browser=browser))


def api(
    root: Path,
    on: str,
    run: str | None,
    *,
    what: str,
    port: int,
    show_key: bool,
    stop: bool,
    dry: bool,
) -> None:
    """Serve a run's model by an OpenAI-compatible API."""
    project, kind = Project.at(root), KINDS["api"]
    if what not in ("adapter", "merged", "base"):
        raise UsageError(f"--what {what}: adapter, merged or base is expected")
    place, local = _asked(project, on, kind, port, stop=stop, dry=dry)
    if local is None:
        return
    with _signals():
        body = service.asked_of(place, kind, serves={"what": what}, run=run)
        _serve(place, kind, body, local, show_key=show_key)


def tensorboard(
    root: Path,
    on: str,
    run: str | None,
    *,
    port: int,
    mirror: str,
    browser: bool,
    stop: bool,
    dry: bool,
) -> None:
    """Show the curves of runs in TensorBoard."""
    from tunesmith.services import (
        tensorboard_packages as packages,  # finds uv, which nothing else here needs
    )

    project, kind = Project.at(root), KINDS["tensorboard"]
    place, local = _asked(project, on, kind, port, stop=stop, dry=dry)
    if local is None:
        return
    with _signals():
        there = place.bring_packages(packages.install(project, mirror), _teller(place))
        settings = {"packages": str(there)}
        if run:
            body = service.asked_of(place, kind, settings=settings, run=run)
        else:
            body = service.asked_of(place, kind, serves={"runs": "all"}, settings=settings)
        _serve(place, kind, body, local, opener=_opener(project, kind, browser=browser))


def _asked(
    project: Project, on: str, kind: Kind, port: int, *, stop: bool, dry: bool
) -> tuple[Place, int | None]:
    """Return where to serve, and on which local port; None: it was stopped, or only told."""
    place = service.place_of(project, on, ending=stop)
    if stop:
        _stop(place, kind, dry=dry)
        return place, None
    local = _local_port(place, kind, port)
    if dry:
        _tell_plan(place, kind, local)
        return place, None
    return place, local


def tunnel(root: Path, on: str, port_word: str, *, local: int, dry: bool) -> None:
    """Bring any port of a host's loopback to this machine."""
    port = int(port_word) if port_word.isascii() and port_word.isdecimal() else 0
    if not 0 < port < 65536:
        raise UsageError(f"port {port_word}: a number from 1 to 65535 is expected")
    if on == "local":
        raise UsageError("--on local: its ports are here already; name a host of `inv host.list`")
    remote = Remote(on, Project.at(root).inventory)
    way = Tunnel(remote, port, free_port(local or None, port))
    if dry:
        say("would run: " + " ".join(way.argv()))
        return
    with _signals(), contextlib.closing(way):
        way.open()
        say(f"{on}: its port {port} is http://127.0.0.1:{way.here} here; Ctrl-C ends the tunnel")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                if not way.alive():
                    reopen(way, say)
                time.sleep(0.5)
        say("the tunnel is closed")


def _serve(
    place: Place,
    kind: Kind,
    body: Mapping[str, Any],
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
        said = service.start(place, kind, {**body, "tokens": tokens}, say)
        there = int(said["port"])
        if place.remote is not None:
            way = Tunnel(place.remote, there, local)
            way.open()
        here = way.here if way else there
        _wait_for_answer(place, kind, here, said.get("key"))
        url = f"http://127.0.0.1:{here}"
        told, *for_browser = [f"{url}/?token={token}" for token in tokens] or [url]
        say(f"{place.name}: {kind.title} is at {told}")
        _tell_more(place, kind, url, said, show_key=show_key)
        if opener is not None:
            _open(opener, for_browser[0])
        _stay(place, kind, way)
    except KeyboardInterrupt:
        if way is not None:
            way.close()
        _leave(place, kind)
    finally:
        if way is not None:
            way.close()
        if opener is not None:
            opener.unlink(missing_ok=True)


def _opener(project: Project, kind: Kind, *, browser: bool) -> Path | None:
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


def _wait_for_answer(place: Place, kind: Kind, port: int, key: str | None) -> None:
    deadline = time.monotonic() + _ANSWER_SECONDS
    status = http_status(port, kind.path, key)
    while status != 200 and time.monotonic() < deadline:
        time.sleep(0.25)
        status = http_status(port, kind.path, key)
    if status != 200:
        found = "nothing" if status is None else f"HTTP {status}"
        raise TunesmithError(
            f"{place.name}: {kind.title} answers there, but {found} comes from 127.0.0.1:{port} "
            f"here; `inv {kind.name} --on {place.name}` tries again"
        )


def _tell_more(
    place: Place, kind: Kind, url: str, said: Mapping[str, Any], *, show_key: bool
) -> None:
    if said.get("key") is None:
        say(
            f"it was started by an earlier version, and opens to anybody who reaches its port: "
            f"end it (`inv {kind.name} --on {place.name} --stop`) and start it again"
        )
    elif kind.browsed:
        say("the address works once, for one browser; the same command gives another")
    if kind.name == "webui":
        say(f"data {place.folders.data}, trainings of the Board {place.folders.base / 'board'}")
    if kind.name == "api":
        serves = said["serves"]
        say(f"model {serves['run']} ({serves['what']})")
        if show_key or not said["reused"]:
            say(f"export API_KEY={said['key']}")
        else:
            say(f"the key was told at the start; `inv api --on {place.name} --show-key` tells it")
        # By a pipe: what curl is started with is seen by every user of the machine.
        say(
            'printf "Authorization: Bearer %s" "$API_KEY" | curl -H @- -H "Content-Type: '
            f'application/json" {url}/v1/chat/completions -d \'{{"model": "{serves["run"]}", '
            '"messages": [{"role": "user", "content": "Hello"}]}\''
        )
    ends = "tunnel and service" if place.remote else "the service"
    stays = "; a training started in it goes on" if kind.name == "webui" else ""
    say(f"Ctrl-C ends {ends}{stays}")


def _stay(place: Place, kind: Kind, way: Tunnel | None) -> None:
    """Keep the tunnel, and return only by an exception: Ctrl-C, or the service's end."""
    looked = time.monotonic()
    while True:
        if way is not None and not way.alive():
            reopen(way, say)
            looked = 0.0  # the host may have been started anew: look at once
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            _check_alive(place, kind)
        time.sleep(0.5)


def _check_alive(place: Place, kind: Kind) -> None:
    """Raise TunesmithError when the service has ended."""
    try:
        said = place.ask("wait", kind.name)
    except TunesmithError:
        if place.remote is None:
            raise
        return  # a host out of reach is the tunnel's affair, and it says so
    if said["state"] == "absent":
        raise TunesmithError(
            f"{place.name}: {kind.title} was ended from elsewhere; `inv {kind.name} --on "
            f"{place.name}` starts it again"
        )
    if said["state"] == "ended":
        raise service.ended(place, kind, said, "ended")


def _leave(place: Place, kind: Kind) -> None:
    """After Ctrl-C: end the service, unless a training runs in it."""
    try:
        said = place.ask("stop", kind.name)
    except TunesmithError as error:
        raise TunesmithError(
            f"{place.name}: {kind.title} may still run there; `inv {kind.name} --on {place.name} "
            "--stop` ends it",
            [error.line],
        ) from None
    if said["state"] == "kept":
        say(f"{place.name}: {kind.title} trains {said['training']['folder']}, so it stays")
        say(f"come back: `inv {kind.name} --on {place.name}`")
        say(f"end it and the training: `inv {kind.name} --on {place.name} --stop`")
    else:
        say(f"{place.name}: {kind.title} is ended")


def _stop(place: Place, kind: Kind, *, dry: bool) -> None:
    if dry:
        say(f"would end {kind.title} of {place.name}")
        return
    said = place.ask("stop", kind.name, "--force")
    if said["state"] == "absent":
        say(f"{place.name}: {kind.title} does not run")
        return
    say(f"{place.name}: {kind.title} is ended")
    if said.get("training"):
        say(f"its training in {said['training']['folder']} was ended too; checkpoints stay there")


def _local_port(place: Place, kind: Kind, port: int) -> int:
    """Return the local end of the tunnel. Without a tunnel the target chooses the port."""
    if place.remote is None:
        if port:
            raise UsageError(f"--port {port}: only a host's service has a port of its own here")
        return 0
    return free_port(port or None, kind.port)


def _tell_plan(place: Place, kind: Kind, local: int) -> None:
    say(f"would start {kind.title} on {place.name}, on its loopback, below {place.folders.base}")
    if place.remote is not None:
        say(f"would forward 127.0.0.1:{local} of this machine to it")


def _teller(place: Place) -> service.Tell:
    return lambda text: say(f"{place.name}: {text}")


@contextlib.contextmanager
def _signals() -> Iterator[None]:
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
