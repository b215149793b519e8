"""The verbs on web services, and on any other port of a host."""

from __future__ import annotations

import contextlib
import time

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import HOST, LOCAL_PORT, MIRROR, MODELS, ON_SERVICE, OPEN, RUN


@command(
    example="inv webui --on gpu1",
    help={
        "on": ON_SERVICE,
        "port": LOCAL_PORT,
        "open": OPEN,
        "stop": "end the Board, and any training started in it",
    },
)
def webui(
    session: Session, on: str = "local", port: int = 0, open: bool = True, stop: bool = False
) -> None:
    """Open LLaMA Board, through a tunnel if on a host."""
    from tunesmith.cli import serving
    from tunesmith.services import service

    project, kind = session.project, service.KINDS["webui"]
    access, local = serving.destination(project, on, kind, port, stop=stop, dry=session.dry)
    if local is None:
        return
    with serving.signals_as_interrupts():
        datasets = access.stage_data(serving.reporter_of(access))
        body = service.asked_of(access, kind, datasets=datasets)
        opener = serving.browser_file(project, kind, browser=open)
        serving.serve(access, kind, body, local, opener=opener)


@command(
    example="inv api --on gpu1 --run RUN_ID --what merged",
    choices={"what": MODELS},
    help={
        "run": RUN,
        "what": "base, adapter (default) or merged",
        "on": ON_SERVICE,
        "port": LOCAL_PORT,
        "show-key": "print the key of an API that is already running",
        "stop": "end the API",
    },
)
def api(
    session: Session,
    run: str = "",
    what: str = "adapter",
    on: str = "local",
    port: int = 0,
    show_key: bool = False,
    stop: bool = False,
) -> None:
    """Serve a run's model through an OpenAI-compatible API."""
    from tunesmith.cli import serving
    from tunesmith.services import service

    kind = service.KINDS["api"]
    access, local = serving.destination(session.project, on, kind, port, stop=stop, dry=session.dry)
    if local is None:
        return
    with serving.signals_as_interrupts():
        body = service.asked_of(access, kind, serves={"what": what}, run=run or None)
        serving.serve(access, kind, body, local, show_key=show_key)


@command(
    example="inv tensorboard --on gpu1",
    help={
        "run": "only this run (default: all)",
        "on": ON_SERVICE,
        "port": LOCAL_PORT,
        "mirror": MIRROR,
        "open": OPEN,
        "stop": "end TensorBoard",
    },
)
def tensorboard(
    session: Session,
    run: str = "",
    on: str = "local",
    port: int = 0,
    mirror: str = "default",
    open: bool = True,
    stop: bool = False,
) -> None:
    """Show the curves of runs in TensorBoard."""
    from tunesmith.cli import serving
    from tunesmith.services import service, tensorboard_packages

    project, kind = session.project, service.KINDS["tensorboard"]
    access, local = serving.destination(project, on, kind, port, stop=stop, dry=session.dry)
    if local is None:
        return
    with serving.signals_as_interrupts():
        packages = tensorboard_packages.install(project, mirror)
        there = access.stage_packages(packages, serving.reporter_of(access))
        settings = {"packages": str(there)}
        if run:
            body = service.asked_of(access, kind, settings=settings, run=run)
        else:
            body = service.asked_of(access, kind, serves={"runs": "all"}, settings=settings)
        opener = serving.browser_file(project, kind, browser=open)
        serving.serve(access, kind, body, local, opener=opener)


@command(
    example="inv tunnel 8888 --on gpu1",
    help={"port": "port on the host", "on": HOST, "local": LOCAL_PORT},
)
def tunnel(session: Session, port: str, on: str, local: int = 0) -> None:
    """Forward a port of a host to this machine."""
    from tunesmith.cli import serving
    from tunesmith.cli.console import say
    from tunesmith.core.errors import UsageError
    from tunesmith.services.service import Services
    from tunesmith.services.tunnel import Tunnel, free_port, reopen
    from tunesmith.targets import factory
    from tunesmith.targets.capability import require

    number = int(port) if port.isascii() and port.isdecimal() else 0
    if not 0 < number < 65536:
        raise UsageError(f"port {port}: a number from 1 to 65535 is expected")
    remote = require(factory.target_of(session.project, on, say), Services).ports()
    if remote is None:
        raise UsageError(
            f"--on {on}: its ports are already here", hint="`inv host.list` shows the hosts"
        )
    way = Tunnel(remote, number, free_port(local or None, number))
    if session.dry:
        say("would run: " + " ".join(way.argv()))
        return
    with serving.signals_as_interrupts(), contextlib.closing(way):
        way.open()
        say(f"{on}: port {number} is http://127.0.0.1:{way.here} here; Ctrl-C ends the tunnel")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                if not way.alive():
                    reopen(way, say)
                time.sleep(0.5)
        say("the tunnel is closed")
