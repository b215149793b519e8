"""Ask a container of the image what tests/state asks of a host."""

from __future__ import annotations

import docker

from tunesmith.hosts.verify import Verified, run_suite
from tunesmith.image import engine
from tunesmith.project import Project


def verify(project: Project, client: docker.DockerClient, name: str) -> Verified:
    """Run the state suite in a hardened container of image `name`; it is removed afterwards.

    Raises UsageError when the image is not there, TunesmithError when pytest could not run.
    """
    engine.find_image(client, name)
    with engine.explained(name):
        container = client.containers.run(
            name, ["infinity"], entrypoint=["sleep"], detach=True, **engine.HARDENED
        )
    try:
        return run_suite(project, name, f"--hosts=docker://{container.id}")
    finally:
        container.remove(force=True)
