"""Run the tests of tests/state in a container of the image, as on a host."""

from __future__ import annotations

import docker

from tunesmith.hosts.verify import Verified, run_suite
from tunesmith.image import engine
from tunesmith.project import Project


def verify(project: Project, client: docker.DockerClient, name: str) -> Verified:
    """Run the state suite in a temporary hardened container of image `name`.

    Raises UsageError if the image does not exist, TunesmithError if pytest could not run.
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
