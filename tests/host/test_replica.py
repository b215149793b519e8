"""The replica hosts are what they claim to be, so that a test on one means something."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replica.build import Images
from replica.replica import GPU_MODES, MIRROR, Replica, names, start, sweep
from tunesmith.core.mirrors import load_mirror

pytestmark = pytest.mark.host

CONDA = "/root/miniconda3/bin/conda"
CHANNEL = f"--override-channels --channel {MIRROR}/conda-forge"
STRICT = "StrictHostKeyChecking=yes"
DISK_BYTES = 64 * 1024 * 1024


def said(replica: Replica, command: str) -> str:
    """Return what a command says through SSH; it must succeed."""
    done = replica.ssh(command)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_autodl_is_started_as_autodl_is(autodl: Replica) -> None:
    assert said(autodl, "tr '\\0' ' ' </proc/1/cmdline") == "bash /init/boot/boot.sh"
    parents = said(autodl, "ps -o ppid= -C sshd,python | sort -u | tr -d ' '")
    assert "1" in parents.split(), "supervisord is a child of PID 1"
    assert said(autodl, "id -u") == "0"
    for lacking in ("python3", "python", "conda", "docker", "tmux", "ss", "sudo"):
        assert autodl.ssh(f"command -v {lacking}").returncode != 0, lacking
    assert "not been booted with systemd" in autodl.ssh("systemctl status").stderr
    assert "http://" in said(autodl, "cat /etc/pip.conf")
    assert "http_proxy" in said(autodl, ". /etc/network_turbo; env")
    assert said(autodl, "echo $SSL_CERT_FILE") == "/etc/ssl/certs/ca-certificates.crt"
    # Only an interactive shell finds conda.
    assert said(autodl, "bash -ic 'command -v python' 2>/dev/null") == (
        "/root/miniconda3/bin/python"
    )
    mounts = said(autodl, "stat -c %m /root/autodl-tmp/. /root/.").split()
    assert mounts == ["/root/autodl-tmp", "/"]


def test_a_vm_has_a_user_with_sudo_and_no_conda(vm: Replica) -> None:
    assert said(vm, "id -un; sudo -n id -un").split() == ["ubuntu", "root"]
    assert said(vm, "command -v python3") == "/usr/bin/python3"
    assert vm.ssh("command -v conda || ls ~/mini* /root/mini*").returncode != 0
    assert said(vm, "touch /data/mine && stat -c %U /data/mine") == "ubuntu"
    assert said(vm, "curl -sS -o /dev/null -w '%{http_code}' https://pypi.org/simple/pip/") == "200"


def test_the_mirror_file_is_one_that_tunesmith_takes(host_project) -> None:  # type: ignore[no-untyped-def]
    mirror = load_mirror(str(host_project.mirror), host_project.project.root / "configs")
    assert mirror.conda_channels == (f"{MIRROR}/conda-forge",)
    stack = host_project.project.stack
    assert os.environ["HOME"] == str(host_project.home)
    assert host_project.project.inventory.parent == host_project.mirror.parent
    assert stack.conda.sha256 in (host_project.project.root / "configs/stack.yml").read_text()


def test_miniforge_from_the_mirror_is_the_one_in_the_stack(vm: Replica, host_project) -> None:  # type: ignore[no-untyped-def]
    conda = host_project.project.stack.conda
    name = f"Miniforge3-{conda.version}-Linux-x86_64.sh"
    said(vm, f"curl -fsS -O {MIRROR}/miniforge/{conda.version}/{name}")
    assert said(vm, f"stat -c %s {name}") == str(conda.size_bytes)
    assert said(vm, f"sha256sum {name}").split()[0] == conda.sha256
    said(vm, f"sh {name} -b -p ~/forge")
    assert "stand-in" in said(vm, "~/forge/bin/conda --version")
    again = vm.ssh(f"sh {name} -b -p ~/forge")
    assert (again.returncode, "already exists" in again.stderr) == (1, True)
    said(vm, f"truncate -s -1 {name}")
    assert vm.ssh(f"sh {name} -b -p ~/other").returncode == 1
    assert said(vm, "~/forge/bin/conda info --base") == "/home/ubuntu/forge"


def test_conda_makes_an_environment_with_a_real_python(autodl: Replica) -> None:
    prefix = "/root/autodl-tmp/tunesmith/envs/llama-factory"
    said(autodl, f"{CONDA} create --yes --prefix {prefix} {CHANNEL} python=3.10 pip")
    said(autodl, f"{CONDA} config --append envs_dirs /root/autodl-tmp/tunesmith/envs")
    code = (
        "import sys, ssl, sqlite3, ctypes, bz2, lzma, readline; print(sys.version[:5], sys.prefix)"
    )
    assert said(autodl, f"{prefix}/bin/python -c '{code}'") == f"3.10. {prefix}"
    assert "python 3.10" in said(autodl, f"{prefix}/bin/pip --version")
    activate = ". /root/miniconda3/etc/profile.d/conda.sh; conda activate llama-factory"
    shown = said(
        autodl,
        f"{activate}; command -v python; echo $CONDA_DEFAULT_ENV; conda deactivate"
        "; command -v python || echo none",
    )
    assert shown.split() == [f"{prefix}/bin/python", "llama-factory", "none"]
    assert prefix in json.loads(said(autodl, f"{CONDA} env list --json"))["envs"]
    assert said(autodl, f"{CONDA} run -n llama-factory python -V").startswith("Python 3.10")
    said(autodl, f"{CONDA} install --yes -p {prefix} {CHANNEL} cuda-nvcc=12.8")
    assert "release 12.8" in said(autodl, f"{prefix}/bin/nvcc --version")
    assert said(autodl, f"{prefix}/bin/python -V").startswith("Python 3.10"), "it stayed"
    said(autodl, f"{CONDA} env remove --yes -n llama-factory")
    assert autodl.ssh(f"ls {prefix}").returncode != 0
    said(autodl, f"{CONDA} config --remove envs_dirs /root/autodl-tmp/tunesmith/envs")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("create --yes -p /tmp/e --no-such-option python", 2, "unrecognized arguments"),
        ("frobnicate", 2, "invalid choice"),
        ("create --yes -p /tmp/e --override-channels python", 1, "At least one -c"),
        (
            f"create --yes -p /tmp/e --override-channels -c {MIRROR}/none python",
            1,
            "UnavailableInvalidChannel",
        ),
        (
            "create --yes -p /tmp/e --override-channels -c http://127.0.0.1:9/x python",
            1,
            "CondaHTTPError",
        ),
        (f"create --yes -p /tmp/e {CHANNEL} python=3.9", 1, "PackagesNotFoundError"),
        (
            f"create --yes -p /tmp/e {CHANNEL} python=3.10 no-such-package",
            1,
            "PackagesNotFoundError",
        ),
        ("run -n nowhere true", 1, "EnvironmentNameNotFound"),
        ("env remove -y -p /tmp", 1, "EnvironmentLocationNotFound"),
        ("activate llama-factory", 1, "conda init"),
    ],
)
def test_conda_refuses_as_conda_does(autodl: Replica, words: str, code: int, text: str) -> None:
    done = autodl.ssh(f"{CONDA} {words}")
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    assert autodl.ssh("ls /tmp/e").returncode != 0, "nothing was begun"


def test_a_sick_mirror(autodl: Replica) -> None:
    create = f"{CONDA} create --yes -p /tmp/sick {CHANNEL} python=3.10"
    autodl.set_mirror("/conda-forge 503")
    failed = autodl.ssh(create)
    assert (failed.returncode, "HTTP 503" in failed.stderr) == (1, True), failed.stderr
    autodl.set_mirror("/conda-forge/linux-64/python cut")
    failed = autodl.ssh(f"{CONDA} clean --all --yes; {create}")
    assert failed.returncode == 1, failed.stdout
    autodl.set_mirror()
    said(autodl, create)
    assert any('"GET /conda-forge/linux-64/python' in line for line in autodl.mirror_requests())


def test_every_gpu_mode(autodl: Replica) -> None:
    ask = "nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader"
    expected = {
        "ok": (0, "570.124.06, 8.9, NVIDIA GeForce RTX 4090"),
        "old_driver": (2, "not a valid field"),
        "blackwell": (0, "570.86.10, 12.0, NVIDIA GeForce RTX 5090"),
        "pascal": (0, "535.161.08, 6.1, Tesla P40"),
        "mixed": (0, "570.124.06, 7.0, Tesla V100-SXM2-32GB\n570.124.06, 8.9"),
        "no_gpu": (6, "No devices were found"),
        "nvml_error": (18, "Driver/library version mismatch"),
        "no_driver": (9, "couldn't communicate with the NVIDIA driver"),
        "absent": (127, ""),
    }
    assert set(expected) <= set(GPU_MODES)
    for mode in GPU_MODES:
        autodl.set_mode(gpu=mode)
        done = autodl.ssh(ask)
        code, text = expected.get(mode, (0, ", "))
        assert (done.returncode, text in done.stdout) == (code, True), f"{mode}: {done}"
    autodl.set_mode(gpu="busy")
    apps = "nvidia-smi --query-compute-apps=pid,process_name,used_memory --format=csv,noheader"
    assert said(autodl, apps) == "4242, /opt/conda/bin/python, 20214 MiB"
    autodl.set_mode(gpu="ok")
    assert said(autodl, "nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits") == (
        "24564"
    )
    assert "Driver Version: 570.124.06" in said(autodl, "nvidia-smi")
    autodl.set_mode(gpu="no_gpu")


def test_reboot_keeps_and_rebuild_resets(new_replica: Callable[..., Replica]) -> None:
    replica = new_replica(kind="autodl")
    said(replica, "echo disk >/root/autodl-tmp/a; echo root >/root/b")
    key, port = replica.fingerprint(), replica.port
    replica.reboot()
    assert said(replica, "cat /root/autodl-tmp/a /root/b").split() == ["disk", "root"]
    assert (replica.fingerprint(), replica.port) == (key, port)
    replica.rebuild(same_port=False)
    assert said(replica, "cat /root/autodl-tmp/a; ls /root/b 2>&1 | tail -c 10").startswith("disk")
    assert replica.ssh("ls /root/b").returncode != 0
    assert replica.fingerprint() != key
    assert replica.port != port
    replica.ssh("shutdown")
    deadline = time.monotonic() + 120
    while replica.running() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not replica.running(), "the platform's shutdown ends PID 1"
    replica.on()
    assert said(replica, "cat /root/autodl-tmp/a") == "disk"


def test_another_host_key(autodl: Replica, tmp_path: Path) -> None:
    pinned = ["-o", f"UserKnownHostsFile={tmp_path / 'known'}"]
    accepted = autodl.ssh("true", options=[*pinned, "-o", "StrictHostKeyChecking=accept-new"])
    assert accepted.returncode == 0
    before = autodl.fingerprint()
    autodl.new_host_key()
    assert autodl.fingerprint() != before
    refused = autodl.ssh("touch /tmp/was-here", options=[*pinned, "-o", STRICT])
    assert refused.returncode == 255
    assert autodl.ssh("ls /tmp/was-here").returncode != 0


@pytest.mark.parametrize("how", ["kill", "reset", "drop"])
def test_ssh_can_be_cut(autodl: Replica, how: str) -> None:
    argv = ["ssh", "-F", "none", "-i", str(autodl.key), "-p", str(autodl.port)]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    argv += ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=3", "-o", "LogLevel=ERROR"]
    argv += ["-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"]
    loop = "for i in $(seq 3000); do echo tick; sleep 0.1; done"
    with subprocess.Popen([*argv, "root@127.0.0.1", loop], stdout=subprocess.PIPE) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == b"tick\n"
        hit = autodl.cut_ssh(how)
        try:
            assert session.wait(timeout=120) == 255
            assert hit or autodl.cut_packets(), "the fault fired"
        finally:
            autodl.heal_ssh()
    assert said(autodl, "echo well") == "well"


def test_a_small_data_disk_fills(new_replica: Callable[..., Replica]) -> None:
    replica = new_replica(kind="autodl", disk_bytes=DISK_BYTES, disk_inodes=200)
    assert int(said(replica, "df --output=size -B1 /root/autodl-tmp | tail -1")) <= DISK_BYTES
    replica.fill_disk(free=1_000_000)
    full = replica.ssh("head -c 2000000 /dev/zero >/root/autodl-tmp/more")
    assert (full.returncode, "No space left" in full.stderr) == (1, True)
    replica.free_disk()
    replica.use_inodes(left=1)
    assert said(replica, "df --output=iavail /root/autodl-tmp | tail -1") == "1"
    assert replica.ssh("cd /root/autodl-tmp && touch one two").returncode == 1
    replica.free_disk()
    said(replica, "rm -f /root/autodl-tmp/more; cd /root/autodl-tmp && touch three")
    replica.rebuild()
    said(replica, "ls /root/autodl-tmp/three")


def test_limits_and_clock(new_replica: Callable[..., Replica]) -> None:
    replica = new_replica(kind="autodl", memory="2g", cpus=1.5)
    limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null"
    assert str(2 * 1024**3) in replica.ssh(limit).stdout.split()
    replica.set_clock(3600)
    assert abs(int(said(replica, "date +%s")) - time.time() - 3600) < 60
    python = "/root/miniconda3/bin/python -c 'import time; print(int(time.time()))'"
    assert abs(int(said(replica, python)) - time.time() - 3600) < 60
    replica.set_clock(0)
    assert abs(int(said(replica, "date +%s")) - time.time()) < 60


def test_a_warm_cache_is_there_on_the_next_host(new_replica: Callable[..., Replica]) -> None:
    first = new_replica(kind="autodl")
    folder = "/root/autodl-tmp/proof-of-warmth"
    said(first, f"mkdir -p {folder}; echo warm >{folder}/a")
    first.keep_warm("proof-of-warmth")
    try:
        second = new_replica(kind="autodl", warm=True)
        assert said(second, f"cat {folder}/a") == "warm"
    finally:
        first.forget_warm("proof-of-warmth")


def test_a_slow_bashrc_slows_a_command_of_ssh(new_replica: Callable[..., Replica]) -> None:
    replica = new_replica(kind="autodl")
    replica.slow_bashrc(2)
    begun = time.monotonic()
    said(replica, "true")
    assert time.monotonic() - begun > 2


def test_hosts_of_a_killed_test_run_are_swept(images: Images) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left, kept = start(images, owner=dead.pid), start(images)
    try:
        sweep()
        assert left.name not in names()
        assert not left.disk.exists()
        assert kept.name in names(), "one started by hand stays"
    finally:
        kept.destroy()


def test_three_hosts_are_three(three_hosts: tuple[Replica, Replica, Replica]) -> None:
    assert len({replica.port for replica in three_hosts}) == 3
    assert len({replica.fingerprint() for replica in three_hosts}) == 3
    assert [said(replica, "id -un") for replica in three_hosts] == ["root", "root", "ubuntu"]


def test_the_password_logs_in_and_without_one_nothing_does(vm: Replica, tmp_path: Path) -> None:
    ask = tmp_path / "ask"
    ask.write_text(f"#!/bin/sh\necho '{vm.password}'\n")
    ask.chmod(0o700)
    argv = ["ssh", "-F", "none", "-p", str(vm.port), "-o", "PubkeyAuthentication=no"]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    argv += ["-o", "LogLevel=ERROR", "ubuntu@127.0.0.1", "id -un"]
    words = os.environ | {"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
    done = subprocess.run(
        argv, env=words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ubuntu"), done.stderr
    refused = vm.ssh("true", options=["-o", "PubkeyAuthentication=no"])
    assert (refused.returncode, "Permission denied" in refused.stderr) == (255, True)
