"""What host.check goes by: the sections of the probe that its rules judge."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.hosts.probe.answer import Answer, Section
from tunesmith.hosts.probe.gpu import Cuda, GpuProcess, Gpus, GpuUse
from tunesmith.hosts.probe.host import Disks, Places, Resources, System, User
from tunesmith.hosts.probe.installed import Environment, Environments
from tunesmith.hosts.probe.program import Program
from tunesmith.hosts.probe.software import (
    Bashrc,
    Condas,
    Mirrors,
    Network,
    Programs,
    Pythons,
    Tried,
)

SECTIONS: tuple[type[Section], ...] = (
    *(User, System, Resources, Places, Disks, Environments, Gpus, GpuUse, Cuda, Network),
    *(Programs, Pythons, Condas, Bashrc, Mirrors),
)


@dataclass(frozen=True)
class Facts:
    """A host as one probe saw it. None or empty where it could not tell.

    `environment` is the training environment, whole or half made; None without one. `seconds`
    is how long the probe took.
    """

    user: User
    system: System
    resources: Resources
    places: Places
    disks: Disks
    environment: Environment | None
    gpu: Gpus
    gpu_processes: tuple[GpuProcess, ...]
    cuda: Cuda
    network: Network
    programs: tuple[str, ...]
    pythons: tuple[Program, ...]
    condas: tuple[Program, ...]
    bashrc_seconds: float | None
    mirrors: tuple[Tried, ...]
    seconds: float

    @property
    def installed(self) -> bool:
        """Whether the environment is there and whole."""
        return self.environment is not None and self.environment.whole


def facts_of(answer: Answer, environment: str) -> Facts:
    """Return the facts in a host's answer; `environment` is the name of the conda environment.

    Raises TunesmithError when the answer says what no host has.
    """
    places = answer.of(Places)
    return Facts(
        user=answer.of(User),
        system=answer.of(System),
        resources=answer.of(Resources),
        places=places,
        disks=answer.of(Disks),
        environment=answer.of(Environments).at(f"{places.base}/envs/{environment}"),
        gpu=answer.of(Gpus),
        gpu_processes=answer.of(GpuUse).processes,
        cuda=answer.of(Cuda),
        network=answer.of(Network),
        programs=answer.of(Programs).programs,
        pythons=answer.of(Pythons).pythons,
        condas=answer.of(Condas).condas,
        bashrc_seconds=answer.of(Bashrc).seconds,
        mirrors=answer.of(Mirrors).tried,
        seconds=answer.seconds,
    )
