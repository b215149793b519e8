"""Free what older builds hold: images of ours without a name, and the builder's cache."""

from __future__ import annotations

import docker
from docker.models.images import Image

from tunesmith.image import engine


def replaced(client: docker.DockerClient, *, everything: bool = False) -> list[Image]:
    """Return our images that a newer build took the name from; with `everything` all of ours.

    Ours are told by their label: nobody else's image is ever touched.
    """
    ours = client.images.list(all=False, filters={"label": f"{engine.TITLE}={engine.REPOSITORY}"})
    return [image for image in ours if everything or not image.tags]


def remove(client: docker.DockerClient, image: Image) -> None:
    """Remove an image under all its names. Raises TunesmithError while a container needs it."""
    with engine.explained(f"image {str(image.id)[7:19]}"):
        for tag in image.tags or [str(image.id)]:
            client.images.remove(tag)


def empty_cache(client: docker.DockerClient) -> int:
    """Empty BuildKit's cache; return the bytes that became free."""
    with engine.explained("the builder's cache"):
        return int(client.api.prune_builds()["SpaceReclaimed"] or 0)
