"""`inv host.add`, `list`, `trust` and `remove` as a user types them, on replicas of hosts."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from replica.replica import Replica
from replica_fixtures import HostProject

pytestmark = pytest.mark.host

SSHD_LOG = "/var/log/sshd.log"


def added(project: HostProject, replica: Replica, name: str) -> str:
    """Add a host as its rental console shows it; return what was said."""
    done = project.inv("host.add", name, replica.address, "--identity", str(project.key))
    assert done.returncode == 0, done.stderr
    return done.stdout


def plain_ssh(project: HostProject, name: str, command: str) -> subprocess.CompletedProcess[str]:
    """Run `ssh NAME` as a user or VS Code does: with ~/.ssh/config and nothing of ours."""
    # OpenSSH asks the password file for the home, so its config has to be named here.
    argv = ["ssh", "-F", str(project.home / ".ssh" / "config"), name, command]
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def logins(replica: Replica) -> int:
    """Return how many sessions sshd has let in, and that its log is one that tells."""
    log = replica.sh(f"cat {SSHD_LOG}")
    assert "Server listening" in log
    return log.count("Accepted ")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_host_is_added_used_and_forgotten(host_project: HostProject, autodl: Replica) -> None:
    said = added(host_project, autodl, "gpu1")
    assert autodl.fingerprint() in said
    assert "/root/miniconda3/bin/python" in said, "the Python that Ansible will use"

    inventory = host_project.project.inventory
    assert mode(inventory) == 0o700
    assert {mode(inventory / name) for name in ("hosts.yml", "ssh_config")} == {0o600}
    shown = host_project.inv("host.list").stdout
    assert f"root@127.0.0.1:{autodl.port}" in shown
    assert plain_ssh(host_project, "gpu1", "echo $0 in $HOME").stdout == "bash in /root\n"

    again = added(host_project, autodl, "gpu1")
    assert "known, address updated" in again

    gone = host_project.inv("host.remove", "gpu1")
    assert gone.returncode == 0, gone.stderr
    assert plain_ssh(host_project, "gpu1", "true").returncode == 255
    assert str(inventory) not in (host_project.home / ".ssh" / "config").read_text()
    unknown = host_project.inv("host.check", "--on", "gpu1")
    assert (unknown.returncode, "inv host.add" in unknown.stderr) == (2, True)


def test_a_refused_key_and_a_host_that_is_off_are_told_apart(
    host_project: HostProject, new_replica: Callable[..., Replica], tmp_path: Path
) -> None:
    replica = new_replica(kind="autodl")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    refused = host_project.inv("host.add", "gpu1", replica.address, "--identity", str(key))
    assert (refused.returncode, "refuses your key" in refused.stderr) == (1, True), refused.stderr

    replica.off()
    off = host_project.inv("host.add", "gpu1", replica.address, "--identity", str(host_project.key))
    assert (off.returncode, "is off" in off.stderr) == (1, True), off.stderr
    assert "no hosts yet" in host_project.inv("host.list").stdout, "nothing was written"


def test_a_key_is_installed_with_the_password_once(
    host_project: HostProject, vm: Replica, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    words = ("host.add", "vm1", vm.address, "--identity", str(key), "--install-key")
    wrong = host_project.inv(*words, text="not-the-password\n")
    assert wrong.returncode == 1, wrong.stdout
    done = host_project.inv(*words, text=f"{vm.password}\n")
    assert done.returncode == 0, done.stderr
    assert vm.password not in done.stdout + done.stderr
    assert plain_ssh(host_project, "vm1", "id -un").stdout == "ubuntu\n"
    keys = vm.sh("cat /home/ubuntu/.ssh/authorized_keys")
    assert keys.count(key.with_suffix(".pub").read_text().strip()) == 1
    assert host_project.inv("host.remove", "vm1").returncode == 0


COMMANDS = (
    ("host.check", "--on", "gpu1"),
    ("host.verify", "--on", "gpu1"),
    ("host.reset", "--on", "gpu1"),
    ("provision", "--on", "gpu1"),
    ("provision", "--on", "gpu1", "--full"),
)


def test_another_host_key_stops_everything_until_it_is_trusted(
    host_project: HostProject, new_replica: Callable[..., Replica]
) -> None:
    replica = new_replica(kind="autodl")
    added(host_project, replica, "gpu1")
    before, pinned = replica.fingerprint(), logins(replica)
    assert pinned > 0, "a login does show in the log"
    replica.rebuild()
    now = replica.fingerprint()
    assert now != before

    for words in COMMANDS:
        stopped = host_project.inv(*words, timeout=60)
        assert stopped.returncode == 1, words
        assert "is not the pinned one" in stopped.stderr + stopped.stdout, stopped
        assert "inv host.trust gpu1" in stopped.stderr + stopped.stdout, stopped
    assert logins(replica) == 0, "no command was sent"

    readded = host_project.inv(
        "host.add", "gpu1", replica.address, "--identity", str(host_project.key)
    )
    assert (readded.returncode, "another machine" in readded.stderr) == (1, True)
    trusted = host_project.inv("host.trust", "gpu1")
    assert trusted.returncode == 0, trusted.stderr
    assert before in trusted.stdout
    assert now in trusted.stdout
    assert plain_ssh(host_project, "gpu1", "echo again").stdout == "again\n"
    assert logins(replica) > 0
    assert host_project.inv("host.remove", "gpu1").returncode == 0


def test_a_key_that_is_not_the_consoles_is_not_pinned(
    host_project: HostProject, autodl: Replica
) -> None:
    before = logins(autodl)
    words = ("host.add", "gpu1", autodl.address, "--identity", str(host_project.key))
    stranger = "SHA256:0000000000000000000000000000000000000000000"
    refused = host_project.inv(*words, "--fingerprint", stranger)
    assert refused.returncode == 1
    assert "not the expected one" in refused.stderr
    assert logins(autodl) == before, "no login was tried"
    assert "no hosts yet" in host_project.inv("host.list").stdout
