"""Push an image to a registry under its measured tags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import docker

from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError
from tunesmith.image import engine


def push(
    client: docker.DockerClient,
    name: str,
    to: str,
    tags: Sequence[str],
    tell: OnText,
) -> Iterator[tuple[str, str]]:
    """Push image `name` to repository `to` under each tag; yield tag and registry digest.

    Authentication is left to `docker login`. Raises TunesmithError with the registry's message.
    """
    image = engine.find_image(client, name)
    for tag in tags:
        image.tag(to, tag)
        tell(f"pushing {to}:{tag}")
        digest = ""
        with engine.explained(f"{to}:{tag}"):
            for line in client.api.push(to, tag=tag, stream=True, decode=True):
                if "error" in line:
                    error = str(line["error"])
                    raise TunesmithError(f"{to}:{tag}: {error}", hint=_hint(to, error))
                digest = str(line.get("aux", {}).get("Digest", digest))
        if not digest:
            raise TunesmithError(f"{to}:{tag}: the registry named no digest")
        yield tag, digest


def _hint(to: str, error: str) -> str:
    if "denied" in error or "unauthorized" in error or "no basic auth" in error:
        return f"log in with `docker login {to.partition('/')[0]}`"
    return ""
