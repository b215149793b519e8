"""A host with the real lock is a training machine, stays one, and is healed.

The host is the session's `provisioned_host`, and is as it was after each test; the tests run
in the order of the file. What can be shown with a small lock is in test_provision_small.py.
"""

from __future__ import annotations

import re

import pytest

from replica.replica import Replica
from replica_fixtures import HostProject

pytestmark = pytest.mark.host

BASE = "/root/autodl-tmp/tunesmith"
HF_HOME = "/root/autodl-tmp/Hugging-Face"
ENVIRONMENT = f"{BASE}/envs/llama-factory"

# Each starts `env`, as a user of that kind of shell gets it.
SHELLS = {
    "a command": "env",
    "a login shell": "bash -lc env",
    "an interactive shell": "bash -ic env 2>/dev/null",
    "a job of sh": "sh -c '. $0/env.sh; env' " + BASE,
}


def said(replica: Replica, command: str) -> str:
    """Return what a command says through plain SSH; it must succeed."""
    done = replica.ssh(command)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def provision(project: HostProject, *words: str) -> str:
    """Run `inv provision` to its good end; return what it said."""
    source = ("--mirror", str(project.mirror))
    done = project.inv("provision", "--on", "gpu1", *source, *words)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def verified(project: HostProject) -> str:
    """Run `inv host.verify`; everything must hold. Return what it said."""
    done = project.inv("host.verify", "--on", "gpu1")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert " 0 failed" in done.stdout
    return done.stdout


def changed(output: str) -> int:
    """Return how many tasks changed something, from the table at the end."""
    found = re.search(r"(?m)^gpu1 +(?:changed|nothing to change) +\d+ +(\d+) ", output)
    assert found, output
    return int(found[1])


def identity(replica: Replica) -> str:
    """Return what tells this environment from one that was made anew."""
    files = "bin/python3.10 conda-meta/history .tunesmith-environment.json"
    return said(replica, f"cd {ENVIRONMENT} && stat -L -c '%n %i %Y' {files}")


@pytest.fixture
def gpu1(provisioned_host: tuple[HostProject, Replica]) -> Replica:
    return provisioned_host[1]


@pytest.fixture
def project(provisioned_host: tuple[HostProject, Replica]) -> HostProject:
    return provisioned_host[0]


def test_every_promise_holds(project: HostProject, gpu1: Replica) -> None:
    assert "skipped" in verified(project), "no GPU here, and it says so"


def test_llamafactory_answers_in_the_environment_found_by_name(gpu1: Replica) -> None:
    # An interactive shell is where AutoDL's users type it.
    commands = (
        "conda activate llama-factory; python -V; command -v python; llamafactory-cli version"
    )
    shown = said(gpu1, f"bash -ic {commands!r} 2>/dev/null")
    assert "Python 3.10." in shown
    assert f"{ENVIRONMENT}/bin/python" in shown
    assert "version 0.9.3" in shown
    assert said(gpu1, f"{ENVIRONMENT}/bin/python -c 'import torch; print(torch.__version__)'") == (
        "2.8.0+cu128"
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_the_variables(gpu1: Replica, shell: str) -> None:
    lines = said(gpu1, SHELLS[shell]).splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert found["HF_ENDPOINT"] == "https://huggingface.co"
    assert found["HF_HOME"] == HF_HOME
    assert found["HF_HUB_DISABLE_XET"] == "1"


def test_a_second_run_is_in_state(project: HostProject, gpu1: Replica) -> None:
    before = identity(gpu1)
    fast = provision(project)
    assert "gpu1: in state" in fast
    assert "ok" not in fast.split(), "the playbook was not run"
    assert changed(provision(project, "--full")) == 0
    looked = provision(project, "--full", "--check", "--diff")
    assert "nothing to change" in looked
    assert identity(gpu1) == before


def test_drift_is_named_and_mended(project: HostProject, gpu1: Replica) -> None:
    before = identity(gpu1)
    said(gpu1, f"echo export HF_ENDPOINT=https://evil.example.com >>{BASE}/env.sh")
    said(gpu1, "sed -i '/BEGIN tunesmith/,/END tunesmith/d' ~/.bashrc")
    told = provision(project)
    assert "2 things to do" in told
    assert "env.sh was edited" in told
    assert ".bashrc: our part is gone" in told
    assert "evil" not in said(gpu1, "env")
    assert said(gpu1, "echo $HF_HOME") == HF_HOME
    assert identity(gpu1) == before, "the environment was left alone"
    assert "in state" in provision(project)


def test_a_rebuilt_host_is_healed_from_its_data_disk(project: HostProject, gpu1: Replica) -> None:
    before = identity(gpu1)
    gpu1.rebuild()
    stopped = project.inv("provision", "--on", "gpu1", "--mirror", str(project.mirror))
    assert (stopped.returncode, "inv host.trust gpu1" in stopped.stderr) == (1, True)
    assert gpu1.ssh("echo $HF_HOME").stdout == "\n", "/ is the image's again"

    assert project.inv("host.trust", "gpu1").returncode == 0
    healed = provision(project)
    assert changed(healed) > 0
    assert "Install every package" not in healed, "nothing was installed again"
    assert identity(gpu1) == before
    verified(project)
    assert changed(provision(project, "--full")) == 0
