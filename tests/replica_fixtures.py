"""Replica hosts, and clones of the repository to drive them from: fixtures for every folder.

Loaded by tests/conftest.py. What can be shared is: `provisioned_host` is made once a session,
by the real lock, for all tests that read or train there and leave it provisioned.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import cli
from replica.build import Images, build
from replica.engine import NEEDS, Engine, NoEngine, start_engine
from replica.replica import Options, Replica, access_key, mirror_content, running, start, sweep
from support import lacking
from tunesmith.project import Project

# The name of `provisioned_host` in the inventory of its clone.
PROVISIONED = "gpu1"


@dataclass(frozen=True)
class HostProject:
    """A clone whose stack.yml fits the replica's installer, with a home of its own.

    `mirror` is the file for `--mirror`; `home` is HOME, with an SSH key that replicas
    accept (OpenSSH itself looks into the account's real home, so name `key`).
    `variables` are those of the environment that make it so; `inv` has them always, the
    test's own process inside `entered`.
    """

    project: Project
    mirror: Path
    home: Path
    key: Path
    variables: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a program that a test starts."""
        left_out = ("SSH_AUTH_SOCK", "ANSIBLE_CONFIG")
        return {k: v for k, v in os.environ.items() if k not in left_out} | dict(self.variables)

    @property
    def inventory(self) -> Path:
        """The folder of the hosts it knows."""
        return Path(self.variables["TUNESMITH_INVENTORY"])

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let the test's own process be in the clone's environment."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.variables.items():
                patch.setenv(name, value)
            for name in ("SSH_AUTH_SOCK", "ANSIBLE_CONFIG"):
                patch.delenv(name, raising=False)
            yield

    def inv(
        self, *words: str, text: str | None = None, timeout: float = 1200
    ) -> subprocess.CompletedProcess[str]:
        """Run `inv` in the clone as a user would."""
        return cli.run(self.project.root, *words, env=self.environment, text=text, timeout=timeout)


def inv(made: HostProject, *words: str, code: int = 0) -> str:
    """Run `inv` in the clone; it must end with `code`. Return what it said."""
    return cli.said(made.inv(*words), code)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The Docker engine; one that we started is stopped at the end."""
    try:
        engine = start_engine()
    except NoEngine as missing:
        lacking(f"{missing}", f"`{NEEDS}`, as root")
    yield engine
    engine.stop()


@pytest.fixture(scope="session")
def images(engine: Engine) -> Images:
    """Images of replica hosts, built on the first use."""
    sweep()
    return build(lambda line: print(line, file=sys.stderr))


@pytest.fixture(scope="module")
def autodl(images: Images) -> Iterator[Replica]:
    """A host like AutoDL's, without a GPU, for the tests of one module."""
    with running(images, Options("autodl", warm=True)) as replica:
        yield replica


@pytest.fixture(scope="module")
def vm(images: Images) -> Iterator[Replica]:
    """A host like a cloud's virtual machine: a user with sudo, no conda."""
    with running(images, Options("vm", warm=True)) as replica:
        yield replica


@pytest.fixture(scope="module")
def three_hosts(images: Images) -> Iterator[tuple[Replica, Replica, Replica]]:
    """Three hosts at once: two like AutoDL's and a virtual machine."""
    with (
        running(images, Options("autodl")) as one,
        running(images, Options("autodl")) as two,
        running(images, Options("vm")) as three,
    ):
        yield one, two, three


@pytest.fixture
def new_replica(images: Images) -> Iterator[Callable[..., Replica]]:
    """Start hosts as a test wants them: `new_replica(kind="autodl", disk_bytes=...)`."""
    started: list[Replica] = []

    def make(**options: object) -> Replica:
        started.append(start(images, Options(**options), owner=os.getpid()))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for replica in started:
        replica.destroy()


@pytest.fixture(scope="module")
def host_project(
    images: Images, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HostProject]:
    """A clone with an inventory and a home of its own; the environment says so meanwhile."""
    made = clone(images, root, tmp_path_factory.mktemp("project"))
    with made.entered():
        yield made


@pytest.fixture(scope="session")
def provisioned_host(
    images: Images, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HostProject, Replica]]:
    """A host like AutoDL's after `host.add` and `provision` with the real lock, no GPU.

    Its name is PROVISIONED. A test that changes what provisioning made brings it back.
    """
    made = clone(images, root, tmp_path_factory.mktemp("provisioned"))
    with running(images, Options("autodl", warm=True)) as replica:
        words = ("host.add", PROVISIONED, replica.address, "--identity", str(made.key))
        added = made.inv(*words)
        assert added.returncode == 0, added.stderr
        done = made.inv("provision", "--on", PROVISIONED, "--mirror", str(made.mirror))
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        if not replica.is_warm():
            # For the next session: the lock's wheels need not be downloaded again.
            replica.keep_warm()
        yield made, replica


def clone(images: Images, root: Path, folder: Path) -> HostProject:
    """Make a clone of the repository in an empty folder."""
    copy, home = folder / "clone", folder / "home"
    _copy_tree(root, copy)
    _fit_stack(copy / "configs" / "stack.yml", images)
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    for source in (access_key(), access_key().with_suffix(".pub")):
        shutil.copy2(source, home / ".ssh")
    mirror = folder / "replica.yml"
    mirror.write_text(yaml.safe_dump(mirror_content()), encoding="utf-8")
    variables = {
        "HOME": str(home),
        "TUNESMITH_HOME": str(folder / "state"),
        "TUNESMITH_INVENTORY": str(folder / "inventory"),
        "PYTHONPATH": str(copy / "src"),
    }
    project = Project(copy, folder / "state")
    return HostProject(project, mirror, home, home / ".ssh" / "id_ed25519", variables)


def _copy_tree(root: Path, target: Path) -> None:
    """Copy what git knows or would add, as a clone has it."""
    argv = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        # A link stays a link: those of ansible/playbooks lead to folders.
        if (root / name).is_symlink() or (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)


def _fit_stack(path: Path, images: Images) -> None:
    """Put size and sha256 of the stand-in installer where the real one's stand."""
    text = path.read_text(encoding="utf-8")
    pattern = r"(?m)^(conda:\n(?:  .*\n)*?  size_bytes: ).*\n  sha256: .*$"
    changed, number = re.subn(
        pattern, rf"\g<1>{images.miniforge_size}\n  sha256: {images.miniforge_sha256}", text
    )
    assert number == 1, f"{path}: no block `conda` as expected"
    path.write_text(changed, encoding="utf-8")
