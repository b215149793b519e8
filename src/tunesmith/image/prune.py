"""Free the space of older builds: our untagged images, and the build cache."""

from __future__ import annotations

import docker
from docker.models.images import Image

from tunesmith.image import engine


def replaced(client: docker.DockerClient, *, everything: bool = False) -> list[Image]:
    """Return our images replaced by newer builds, or with `everything` all our images.

    Our images are identified by a label; other images are never touched.
    """
    ours = client.images.list(all=False, filters={"label": f"{engine.TITLE}={engine.REPOSITORY}"})
    return [image for image in ours if everything or not image.tags]


def remove(client: docker.DockerClient, image: Image) -> None:
    """Remove an image under all its names. Raises TunesmithError while a container needs it."""
    with engine.explained(f"image {str(image.id)[7:19]}"):
        for tag in image.tags or [str(image.id)]:
            client.images.remove(tag)


def empty_cache(client: docker.DockerClient) -> int:
    """Empty BuildKit's cache; return the freed bytes."""
    with engine.explained("the builder's cache"):
        return int(client.api.prune_builds()["SpaceReclaimed"] or 0)
