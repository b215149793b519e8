"""Push an image to a registry under its measured tags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import docker

from tunesmith.core.callbacks import Bar, OnText, unseen
from tunesmith.core.errors import TunesmithError
from tunesmith.image import engine


def push(
    client: docker.DockerClient,
    name: str,
    to: str,
    tags: Sequence[str],
    tell: OnText,
    bar: Bar = unseen,
) -> Iterator[tuple[str, str]]:
    """Push image `name` to repository `to` under each tag; yield tag and registry digest.

    `bar` shows how much is up. Who may push is `docker login`'s matter. Raises TunesmithError
    with the registry's word.
    """
    image = engine.find_image(client, name)
    for tag in tags:
        image.tag(to, tag)
        tell(f"pushing {to}:{tag}")
        digest = ""
        layers: dict[str, tuple[int, int]] = {}
        with engine.explained(f"{to}:{tag}"), bar("pushing") as moved:
            for line in client.api.push(to, tag=tag, stream=True, decode=True):
                if done := _done(line):
                    layers[str(line.get("id"))] = done
                    moved(*map(sum, zip(*layers.values(), strict=True)))
                if "error" in line:
                    error = str(line["error"])
                    raise TunesmithError(f"{to}:{tag}: {error}", hint=_hint(to, error))
                digest = str(line.get("aux", {}).get("Digest", digest))
        if not digest:
            raise TunesmithError(f"{to}:{tag}: the registry named no digest")
        yield tag, digest


def _done(line: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the bytes of a layer that are up, and all of them; None where a line is of none."""
    detail = line.get("progressDetail") or {}
    done, total = detail.get("current"), detail.get("total")
    # The engine counts tar headers, too, which are not in the total.
    return (min(done, total), total) if isinstance(done, int) and isinstance(total, int) else None


def _hint(to: str, said: str) -> str:
    if "denied" in said or "unauthorized" in said or "no basic auth" in said:
        return f"log in with `docker login {to.partition('/')[0]}`"
    return ""
