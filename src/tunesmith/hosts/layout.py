"""Where things lie on a provisioned host, asked with one SSH command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts.remote import Remote


@dataclass(frozen=True)
class Layout:
    """What a provisioned host has, and where.

    `base` is tunesmith's folder on the data disk, `environment` the conda environment,
    `flavour` and `lock_sha256` what is installed there, `asked` what it was provisioned for
    (the parts of the state's fingerprint), `free_bytes` the room on the data disk, `mirror`
    the mirror profile for downloads there (a name, or a file there), `sudo` what an
    administrator's command begins with there.
    """

    base: PurePosixPath
    environment: PurePosixPath
    hf_home: PurePosixPath
    flavour: str
    lock_sha256: str
    asked: Mapping[str, str]
    free_bytes: int
    mirror: str
    sudo: tuple[str, ...]

    @property
    def disk(self) -> PurePosixPath:
        """The data disk."""
        return self.base.parent

    @property
    def app(self) -> str:
        """The short digest of tunesmith's sources there; empty: unknown."""
        return self.asked.get("app", "")

    @property
    def python(self) -> PurePosixPath:
        """The interpreter of the training environment."""
        return self.environment / "bin" / "python"

    @property
    def runs(self) -> PurePosixPath:
        """The folder of run folders."""
        return self.base / "runs"

    @property
    def models(self) -> PurePosixPath:
        """The store of base models (tunesmith.basemodel.store)."""
        return self.base / "models"

    @property
    def data(self) -> PurePosixPath:
        """LLaMA-Factory's data folder of the host."""
        return self.base / "data"

    @property
    def variables(self) -> PurePosixPath:
        """A POSIX sh file with the variables of every job; `.` reads it."""
        return self.base / "env.sh"


def look(remote: Remote) -> Layout:
    """Return where things lie on a host.

    Raises UsageError for a host that was not provisioned to the end, TunesmithError for one
    that answers what no such host does.
    """
    # Here: a training on this machine looks at no host, and starts in a third of a second.
    from tunesmith.hosts.probe.ask import ask
    from tunesmith.hosts.probe.host import Places, User
    from tunesmith.hosts.probe.installed import Environments, Provisioned

    answer = ask(remote, User, Places, Environments, Provisioned)
    places, environments = answer.of(Places), answer.of(Environments).whole
    if not places.provisioned or not environments:
        raise not_provisioned(remote.name)
    user, provisioned, environment = answer.of(User), answer.of(Provisioned), environments[-1]
    made = (environment.flavour, environment.lock_sha256)
    if places.room is None or user.uid is None or not provisioned.hf_home or not all(made):
        raise TunesmithError(
            f"{remote.name}: {places.provisioned} cannot be read",
            hint=f"`inv provision --on {remote.name}` repairs it",
        )
    return Layout(
        base=PurePosixPath(places.provisioned),
        environment=PurePosixPath(environment.path),
        hf_home=PurePosixPath(provisioned.hf_home),
        flavour=environment.flavour,
        lock_sha256=environment.lock_sha256,
        asked=provisioned.asked,
        free_bytes=places.room.free,
        mirror=provisioned.mirror_file or "default",
        sudo=() if user.uid == 0 else ("sudo", "-n"),
    )


def not_provisioned(name: str) -> UsageError:
    """Return the error for a host without tunesmith's folder."""
    return UsageError(f"{name} is not provisioned", hint=f"`inv provision --on {name}` does it")
