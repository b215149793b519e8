"""The Docker engine, through its SDK, with readable errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import docker
from docker.context import ContextAPI
from docker.errors import DockerException, ImageNotFound, NotFound
from docker.models.images import Image
from requests.exceptions import ConnectionError as NoConnection

from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.printable import one_line
from tunesmith.stack.definition import Flavour

REPOSITORY = "tunesmith"
# Labels of our images: what it is, and the digests of its inputs.
TITLE = "org.opencontainers.image.title"
STACK, LOCK, APP = "tunesmith.stack.sha256", "tunesmith.lock.sha256", "tunesmith.app.sha256"
# APP covers the code that works on runs, SOURCES all our code (stack/sources.py).
SOURCES = "tunesmith.sources.sha256"
FLAVOUR = "tunesmith.flavour"

DEFAULT = "unix:///var/run/docker.sock"
# The NVIDIA container toolkit's name among an engine's runtimes.
NVIDIA = "nvidia"
# A limit, not a reservation: enough for NCCL and data loaders on any machine.
SHM_SIZE = "8g"


def tag_of(flavour: Flavour) -> str:
    """Return the tag of a flavour's image on the engine that built it."""
    return f"{REPOSITORY}:{flavour.name}"


def address() -> str:
    """Return where the engine listens: DOCKER_HOST, else the current context's.

    The docker command does the same; the SDK alone ignores contexts.
    """
    own = os.environ.get("DOCKER_HOST")
    if own:
        return own
    current = ContextAPI.get_current_context()
    host = current.Host if current is not None else None
    return str(host).replace("http+unix://", "unix://") if host else DEFAULT


def connect(base_url: str | None = None, timeout: float = 600) -> docker.DockerClient:
    """Return a client of the engine. Raises UsageError if none answers or access is denied.

    `timeout` is the time limit of one request, in seconds.
    """
    url = base_url or address()
    try:
        client = docker.DockerClient(base_url=url, timeout=int(timeout))
        client.ping()
    except (DockerException, NoConnection, OSError) as error:
        message, hint = reason(url, str(error))
        raise UsageError(message, hint=hint) from None
    return client


def reason(url: str, error: str) -> tuple[str, str]:
    """Return why an engine does not answer, and the hint."""
    if "Permission denied" in error or "PermissionError" in error:
        return (
            f"this user has no access to the Docker engine at {url}",
            "run `sudo usermod -aG docker $USER`, then log in again",
        )
    if url.startswith("unix://"):
        return (
            f"no Docker engine answers at {url}",
            "start it with `sudo systemctl start docker`, or install one "
            "(docs.docker.com/engine/install)",
        )
    return (
        f"no Docker engine answers at {url}",
        "choose another one with DOCKER_HOST or `docker context use`",
    )


@contextlib.contextmanager
def explained(what: str, *, foreign: bool = False) -> Iterator[None]:
    """Convert an error of the SDK to a message that begins with `what`.

    `foreign`: the engine is a host's, whose answers may lack fields that the SDK and we read; that
    is reported, too. The block must only send requests to the engine.
    """
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if not foreign:
            raise
        text = one_line(f"{type(error).__name__}: {error}")
        raise TunesmithError(f"{what} answers what no Docker engine does ({text})") from None
    except (DockerException, NoConnection) as error:
        text = getattr(error, "explanation", None) or str(error)
        line = " ".join(str(text).split())
        raise TunesmithError(f"{what}: {line}", hint=_hint(line)) from None


def _hint(text: str) -> str:
    """Return the hint for a known error of an engine."""
    if 'could not select device driver "" with capabilities: [[gpu]]' in text or (
        "unknown or invalid runtime name: nvidia" in text
    ):
        return (
            "install the NVIDIA container toolkit, then run "
            "`sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker`"
        )
    if "no space left on device" in text:
        return "remove older images with `inv image.prune`"
    return ""


def find_image(client: docker.DockerClient, name: str) -> Image:
    """Return an image of the engine. Raises UsageError if it has none of this name."""
    try:
        return client.images.get(name)
    except ImageNotFound:
        raise UsageError(
            f"there is no image {name}", hint="build it with `inv image.build`"
        ) from None


def run_in(client: docker.DockerClient, image: str, argv: list[str]) -> str:
    """Run a command in a temporary hardened container; return its output.

    Raises TunesmithError with the end of its standard error if it fails.
    """
    with explained(f"{image}: {argv[0]}"):
        container = client.containers.create(image, argv[1:], entrypoint=argv[:1], **HARDENED)
        try:
            container.start()
            code = container.wait()["StatusCode"]
            output = container.logs(stdout=True, stderr=False).decode("utf-8", "replace")
            errors = container.logs(stdout=False, stderr=True).decode("utf-8", "replace")
        finally:
            with contextlib.suppress(NotFound):
                container.remove(force=True)
    if code != 0:
        raise TunesmithError(
            f"{image}: {argv[0]} ended with exit code {code}", errors.strip().splitlines()[-5:]
        )
    return output


# The minimal privileges of all our containers. `init` is the image's own.
HARDENED: JsonObject = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "mode=1777"},  # noqa: S108 - inside the container
}


def has_nvidia(client: docker.DockerClient) -> bool:
    """Whether the engine can give GPUs to a container."""
    info = client.info()
    devices = any(str(d.get("ID", "")).startswith("nvidia.com/gpu") for d in _cdi(info))
    return NVIDIA in info.get("Runtimes", {}) or devices


def _cdi(info: JsonObject) -> list[JsonObject]:
    return list(info.get("DiscoveredDevices") or [])


def version_of(text: str) -> int:
    """Return the major version in the output of `docker --version`, 0 if there is none."""
    found = re.search(r"version (\d+)\.", text)
    return int(found[1]) if found else 0
