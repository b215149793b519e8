"""The Docker engine, through its SDK, with errors as people need them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping

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
# Labels of an image of ours: what it is, and the digests of what it was made from.
TITLE = "org.opencontainers.image.title"
STACK, LOCK, APP = "tunesmith.stack.sha256", "tunesmith.lock.sha256", "tunesmith.app.sha256"
# Extras that an image was built with, as words NAME=SHA256_OF_ITS_LOCK.
EXTRAS = "tunesmith.extras"
# APP is of what works on runs, SOURCES of all of ours (stack/sources.py).
SOURCES = "tunesmith.sources.sha256"
FLAVOUR = "tunesmith.flavour"

DEFAULT = "unix:///var/run/docker.sock"
# The NVIDIA container toolkit's name among an engine's runtimes.
NVIDIA = "nvidia"
# A limit, not a reservation: what NCCL and data loaders ask for, whatever the machine has.
SHM_SIZE = "8g"


def tag_of(flavour: Flavour) -> str:
    """Return the name an image of a flavour has on the engine that built it."""
    return f"{REPOSITORY}:{flavour.name}"


def address() -> str:
    """Return where the engine listens: DOCKER_HOST, else the current context's.

    The docker command does the same; the SDK alone would not look at contexts.
    """
    own = os.environ.get("DOCKER_HOST")
    if own:
        return own
    current = ContextAPI.get_current_context()
    host = current.Host if current is not None else None
    return str(host).replace("http+unix://", "unix://") if host else DEFAULT


def connect(base_url: str | None = None, timeout: float = 600) -> docker.DockerClient:
    """Return a client of the engine. Raises UsageError when none answers or it is not ours.

    `timeout` is in seconds, for one answer of the engine.
    """
    url = base_url or address()
    try:
        client = docker.DockerClient(base_url=url, timeout=int(timeout))
        client.ping()
    except (DockerException, NoConnection, OSError) as error:
        message, hint = reason(url, str(error))
        raise UsageError(message, hint=hint) from None
    return client


def reason(url: str, said: str) -> tuple[str, str]:
    """Return why an engine does not answer, and the hint."""
    if "Permission denied" in said or "PermissionError" in said:
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
    """Turn an error of the SDK into a line that begins with `what`.

    `foreign`: the engine is a host's, whose answers may lack what the SDK and we look for; then
    that is told, too. The block must ask the engine and do nothing else.
    """
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if not foreign:
            raise
        said = one_line(f"{type(error).__name__}: {error}")
        raise TunesmithError(f"{what} answers what no Docker engine does ({said})") from None
    except (DockerException, NoConnection) as error:
        text = getattr(error, "explanation", None) or str(error)
        said = " ".join(str(text).split())
        raise TunesmithError(f"{what}: {said}", hint=_hint(said)) from None


def _hint(text: str) -> str:
    """Return what helps against an engine's error, where that is known."""
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
    """Return an image of the engine. Raises UsageError when it has none of this name."""
    try:
        return client.images.get(name)
    except ImageNotFound:
        raise UsageError(
            f"there is no image {name}", hint="build it with `inv image.build`"
        ) from None


def run_in(client: docker.DockerClient, image: str, argv: list[str]) -> str:
    """Run a command in a hardened container that is removed again; return its output.

    Raises TunesmithError with the end of its standard error when it fails.
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


# What every container of ours gets: nothing it has no need of. `init` is the image's own.
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
    """Return the major version in `docker --version`'s line, 0 when there is none."""
    found = re.search(r"version (\d+)\.", text)
    return int(found[1]) if found else 0


def extras_of(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the extras that an image with these labels has: name -> sha256 of the lock."""
    words = [word.partition("=") for word in labels.get(EXTRAS, "").split()]
    return {name: digest for name, _, digest in words}
