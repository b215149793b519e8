"""The web services of a container: LLaMA Board and the API, which it is itself.

On a clone the verbs of these names start a service somewhere else.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.cli.command import Session, command
from tunesmith.cli.container_checks import mount_fault
from tunesmith.cli.options import LANGUAGES, MODELS, RUN
from tunesmith.core.errors import UsageError

_ADDRESS = "python -I -m tunesmith.cli.container address"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@command(
    example="inv webui",
    choices={"language": LANGUAGES},
    help={"language": "of the page at first: en or zh"},
)
def webui(session: Session, language: str = "en") -> None:
    """LLaMA Board on port 7860, without a model's own code."""
    from tunesmith.cli.console import say

    if fault := mount_fault():
        raise fault
    listen, port = listening("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "webui")
    say_reach("GRADIO_SERVER_NAME", listen, port)
    settings = {"data": str(session.project.find("data")), "language": language}
    # The token is not printed: Docker keeps what a container says.
    named = os.environ.get("HOSTNAME", "")
    container = named if re.fullmatch(r"[0-9a-f]{12}", named) else "CONTAINER"
    how = f"`docker exec {container} {_ADDRESS}` prints an address that works once"
    say(f"LLaMA Board on port {port}: {how}")
    _serve(session, "webui", settings, listen, port, key=secrets.token_urlsafe(32), hint=how)


@command(example="inv address")
def address(_session: Session) -> None:
    """(docker exec) The address of that Board, which works once."""
    from tunesmith.cli.console import say
    from tunesmith.job.services import access, manager

    found = manager.served_here("webui")
    record = found.record() if found else None
    if found is None or record is None:
        raise UsageError(
            "LLaMA Board does not run in this container",
            hint=f"`inv webui` starts one; then ask it with `docker exec CONTAINER {_ADDRESS}`",
        )
    token = secrets.token_urlsafe(32)
    access.admit(found.tokens, token)
    say(f"http://127.0.0.1:{record.port}/?token={token}")


@command(
    example="inv api --run RUN_ID --what merged",
    choices={"what": MODELS},
    help={
        "run": RUN,
        "what": "base, adapter (default) or merged",
        "config": "none: a config is for `llamafactory-cli api CONFIG`",
    },
)
def api(session: Session, run: str = "", what: str = "adapter", config: str = "") -> None:
    """A run's model as OpenAI-compatible API on port 8000, with a key."""
    from tunesmith.cli.console import say
    from tunesmith.job.run.listing import find

    key = _given_key()
    listen, port = listening("API_HOST", "API_PORT", "api")
    if not key:
        # One made here would be told in the container's log, which Docker keeps.
        raise UsageError(
            f"api on {listen} without an API_KEY would serve anybody who reaches it",
            hint="`export API_KEY=...` with a secret of your own, and add `-e API_KEY` to docker "
            "run (or name a file of it by API_KEY_FILE)",
        )
    if config:
        raise UsageError(
            f"api {config}: it serves a run, not a config",
            hint="`inv api --run RUN`, or LLaMA-Factory's own: `docker run ... IMAGE "
            f"llamafactory-cli api {config}`",
        )
    if fault := mount_fault(writing=False):
        raise fault
    # An empty --run is what docker/compose.yaml says for the newest.
    found = find(session.project.runs, run or None)
    say(f"model {found.run_id} ({what})")
    say_reach("API_HOST", listen, port)
    serves = {"what": what}
    _serve(session, "api", {}, listen, port, serves=serves, run=found.run_id, key=key)


def _given_key() -> str:
    """Return the key that the user gave by API_KEY or in the file of API_KEY_FILE; "": none.

    Raises UsageError for a file that cannot be read.
    """
    # Not for the processes below: they have no need of it.
    key, named = os.environ.pop("API_KEY", ""), os.environ.get("API_KEY_FILE")
    if key or not named:
        return key
    try:
        return Path(named).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"API_KEY_FILE={named}: {error}", hint=f"mount it: `-v KEYFILE:{named}:ro`"
        ) from None


def listening(key: str, port_key: str, service: str) -> tuple[str, int]:
    """Return the address and port that the variables ask for, else those of the service."""
    from tunesmith.job.services.manager import PORTS
    from tunesmith.job.services.records import LOOPBACK

    listen = os.environ.get(key) or LOOPBACK
    given = os.environ.get(port_key) or str(PORTS[service])
    if not (given.isascii() and given.isdecimal() and 0 < int(given) < 65536):
        raise UsageError(f"{port_key}={given}: a number from 1 to 65535 is expected")
    return listen, int(given)


def say_reach(key: str, listen: str, port: int) -> None:
    """Say how a server is reached that only its own container can reach."""
    from tunesmith.cli.console import say

    if listen in _LOOPBACK:
        say(
            f"listening on the container's own 127.0.0.1:{port}; to reach it from this "
            f"machine add `-e {key}=0.0.0.0 -p 127.0.0.1:{port}:{port}`"
        )


def _serve(
    session: Session,
    name: str,
    settings: Mapping[str, str],
    listen: str,
    port: int,
    **more: Any,
) -> None:
    from tunesmith.job.services import access, manager
    from tunesmith.job.services.records import ServiceRequest

    project = session.project
    folders = {"models": str(project.models), "runs": str(project.runs)}
    # Into a pipe, as `docker logs` reads it, lines would come when a page is full.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # A name under which somebody publishes it; 127.0.0.1 and localhost are always taken.
    try:
        allowed = access.parse_names(os.environ.get(access.ALLOWED, ""))
    except UsageError as error:
        raise UsageError(f"{access.ALLOWED}: {error.message}", hint=error.hint) from None
    body = {"serves": {}, "settings": folders | dict(settings), "allowed": allowed, **more}
    request = ServiceRequest.of(body)
    manager.serve_here(name, request, base=project.home, listen=listen, port=port)
