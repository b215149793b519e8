"""`image.ship` to a host like a virtual machine with Docker, and `image.push` to a registry.

The host's engine is a second dockerd with a folder of its own; its socket lies on the host's
data disk, and the docker command there is this machine's.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from replica.build import Images
from replica.engine import Engine
from replica.replica import Options, Replica, running
from replica_fixtures import HostProject, clone
from support import lacking
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of
from tunesmith.hosts.remote import Remote
from tunesmith.image import engine as image_engine
from tunesmith.image import push, ship

pytestmark = pytest.mark.image

NAME = "tunesmith:cut-test"
HOST = "vm1"
CUTS = 5
# So slow that a connection can be cut while a layer is under way.
KBYTES_PER_SECOND = 3000


@pytest.fixture(scope="module")
def small(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image of two layers that do not compress, under a name of ours."""
    context = tmp_path_factory.mktemp("context")
    for name, size in (("one", 4_000_000), ("two", 16_000_000)):
        (context / name).write_bytes(random.Random(name).randbytes(size))
    (context / "Dockerfile").write_text("FROM scratch\nCOPY one /\nCOPY two /\nENV A=b\n")
    build = ["/usr/bin/docker", "build", "--quiet", "--tag", NAME, str(context)]
    subprocess.run(build, check=True, capture_output=True)
    yield NAME
    subprocess.run(["docker", "rmi", NAME], check=True, capture_output=True)


@pytest.fixture(scope="module")
def vm(
    images: Images, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HostProject, Replica]]:
    """A virtual machine with Docker, in the inventory of a clone."""
    made = clone(images, root, tmp_path_factory.mktemp("ship"))
    with running(images, Options("vm")) as replica, second_engine(replica):
        words = ("host.add", HOST, replica.address, "--identity", str(made.key))
        added = made.inv(*words)
        assert added.returncode == 0, added.stderr
        yield made, replica


@contextlib.contextmanager
def second_engine(replica: Replica) -> Iterator[None]:
    """Let a replica have a Docker engine: dockerd's socket on its data disk."""
    mount = replica.options.mount
    folder = replica.disk / "engine"
    folder.mkdir()
    # In a network of its own: `--bridge none` removes the bridge that is there, and that is
    # the machine's own engine's.
    argv = [
        "unshare",
        "--net",
        "/usr/sbin/dockerd",
        "--log-level",
        "error",
        "--bridge",
        "none",
        "--iptables=false",
    ]
    argv += ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
    argv += ["--pidfile", f"{folder}/pid", "--host", f"unix://{replica.disk}/docker.sock"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not (replica.disk / "docker.sock").exists():
            assert process.poll() is None and time.monotonic() < deadline, (
                folder / "log"
            ).read_text()
            time.sleep(0.2)
        (replica.disk / "docker.sock").chmod(0o666)
        subprocess.run(
            ["docker", "cp", "/usr/bin/docker", f"{replica.container}:/usr/bin/docker"], check=True
        )
        replica.sh(f"ln -s {mount}/docker.sock /var/run/docker.sock")
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def far(replica: Replica, *words: str) -> str:
    return replica.ssh("docker " + " ".join(words)).stdout.strip()


def forget(replica: Replica) -> None:
    replica.ssh(f"docker rmi --force {NAME}; docker system prune --all --force")


@pytest.fixture
def slow_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a slow line: rsync itself, told to be slow."""
    real = shutil.which("rsync")
    if real is None:
        lacking("no rsync", "`apt-get install rsync`")
    program = tmp_path / "bin/rsync"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {real} --bwlimit={KBYTES_PER_SECOND} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_an_image_arrives_though_the_line_is_cut_five_times(
    small: str, vm: tuple[HostProject, Replica], slow_line: None, tmp_path: Path
) -> None:
    made, replica = vm
    forget(replica)
    client = image_engine.connect()
    remote = Remote(HOST, made.inventory)
    said: list[str] = []
    cuts: list[int] = []
    done = threading.Event()

    def cut() -> None:
        while len(cuts) < CUTS and not done.is_set():
            # Only while a layer is under way: rsync's own half of it has grown.
            grown = int(replica.sh("du -sk /home/ubuntu/.cache 2>/dev/null | cut -f1 || true") or 0)
            under_way = grown > 300 + 200 * len(cuts) and replica.sh("pgrep -x rsync || true")
            if under_way and (hit := replica.cut_ssh("kill")):
                cuts.append(hit)
            time.sleep(0.3)

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        with made.entered():
            assert ship.ship(client, small, remote, tmp_path / "cache", said.append)
    finally:
        done.set()
        thread.join()
    assert len(cuts) == CUTS, (cuts, said)
    assert sum("the connection was cut" in line for line in said) >= CUTS, said
    image = client.images.get(small)
    assert far(replica, "image", "inspect", "--format", "'{{.Id}}'", NAME) == image.id
    # Nothing is left on either side.
    assert not (tmp_path / "cache").exists()
    left = replica.ssh("find .cache/tunesmith/image -type f").stdout
    assert left == ""
    with made.entered():
        assert not ship.ship(client, small, remote, tmp_path / "cache", said.append)
    assert said[-1].endswith("already")


def test_only_layers_that_are_not_there_are_sent(
    small: str, vm: tuple[HostProject, Replica], tmp_path: Path
) -> None:
    made, replica = vm
    client = image_engine.connect()
    forget(replica)
    remote = Remote(HOST, made.inventory)
    said: list[str] = []
    with made.entered():
        ship.ship(client, small, remote, tmp_path / "cache", said.append)
        (tmp_path / "Dockerfile").write_text(f"FROM {small}\nCOPY three /\n")
        (tmp_path / "three").write_text("small")
        tag = "tunesmith:cut-test-2"
        build = ["/usr/bin/docker", "build", "--quiet", "--tag", tag, str(tmp_path)]
        subprocess.run(build, check=True, capture_output=True)
        try:
            ship.ship(client, tag, remote, tmp_path / "cache", said.append)
            assert "in 1 layers (2 are there)" in said[-2], said
            there = far(replica, "image", "inspect", "--format", "'{{.Id}}'", tag)
            assert there == client.images.get(tag).id
        finally:
            subprocess.run(["docker", "rmi", tag], check=True, capture_output=True)
            far(replica, "rmi", tag)


def test_what_was_changed_on_the_way_is_not_loaded(
    small: str, vm: tuple[HostProject, Replica], tmp_path: Path
) -> None:
    made, replica = vm
    client = image_engine.connect()
    forget(replica)
    remote = Remote(HOST, made.inventory)
    layers = tuple(client.images.get(small).attrs["RootFS"]["Layers"])
    cache = tmp_path / "cache"
    ship.pack(client, small, layers, set(layers), cache, print)
    victim = max(cache.glob("*.tar.gz"), key=lambda path: path.stat().st_size)
    # A half-sent file of the same size and time, as a broken disk would have it.
    replica.ssh("mkdir -p .cache/tunesmith/image")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    os.utime(victim, (1_700_000_000, 1_700_000_000))
    (replica.disk / victim.name).write_bytes(content)
    mount = replica.options.mount
    replica.ssh(
        f"cp {mount}/{victim.name} .cache/tunesmith/image/ && "
        f"touch -d @1700000000 .cache/tunesmith/image/{victim.name}"
    )
    with made.entered(), pytest.raises(TunesmithError, match="differs from what was sent"):
        ship.ship(client, small, remote, cache, print)
    assert NAME not in far(replica, "image", "ls", "--format", "'{{.Repository}}:{{.Tag}}'")
    # It was removed there, so the same command mends it.
    with made.entered():
        assert ship.ship(client, small, remote, cache, print)


def test_packing_is_the_same_each_time(small: str, engine: Engine, tmp_path: Path) -> None:
    """So that a half-sent layer can be gone on with after anything."""
    client = image_engine.connect()
    layers = tuple(client.images.get(small).attrs["RootFS"]["Layers"])
    sums = []
    for name in ("a", "b"):
        ship.pack(client, small, layers, set(layers), tmp_path / name, print)
        sums.append({p.name: sha256_of(p) for p in (tmp_path / name).glob("*.tar.gz")})
    assert sums[0] == sums[1]
    assert len(sums[0]) == 2


def test_a_host_without_docker(vm: tuple[HostProject, Replica]) -> None:
    made, replica = vm
    remote = Remote(HOST, made.inventory)
    replica.sh("mv /usr/bin/docker /root/docker")
    try:
        with made.entered(), pytest.raises(UsageError, match=f"{HOST}: there is no Docker"):
            ship.look(remote)
    finally:
        replica.sh("mv /root/docker /usr/bin/docker")
    (replica.disk / "docker.sock").chmod(0o600)
    try:
        with made.entered(), pytest.raises(UsageError, match="no access to Docker") as refused:
            ship.look(remote)
        assert "sudo usermod -aG docker" in (refused.value.hint or "")
    finally:
        (replica.disk / "docker.sock").chmod(0o666)


def test_push_to_a_registry(small: str, tmp_path: Path) -> None:
    program = shutil.which("docker-registry")
    if program is None:
        lacking("no registry", "`apt-get install docker-registry`")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: "
        f"{tmp_path}/store}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    registry = subprocess.Popen([program, "serve", str(config)], stderr=subprocess.DEVNULL)
    to = f"127.0.0.1:{port}/me/tunesmith"
    client = image_engine.connect()
    try:
        wait_for_port(port)
        pushed = list(push.push(client, small, to, ["exact", "cu128"], print))
        assert [tag for tag, _ in pushed] == ["exact", "cu128"]
        assert pushed[0][1].startswith("sha256:")
        assert pushed[0][1] == pushed[1][1]
        pulled = client.images.pull(f"{to}@{pushed[0][1]}")
        assert pulled.id == client.images.get(small).id
    finally:
        registry.send_signal(signal.SIGTERM)
        registry.wait(timeout=30)
    for tag in ("exact", "cu128"):
        client.images.remove(f"{to}:{tag}")
    with pytest.raises(TunesmithError, match="refused"):
        list(push.push(client, small, to, ["gone"], print))
    client.images.remove(f"{to}:gone")


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on {port}")


def test_prune_touches_only_ours(engine: Engine, tmp_path: Path) -> None:
    from tunesmith.image import prune

    client = image_engine.connect()
    (tmp_path / "x").write_text("x")
    ids = []
    for label in (f"{image_engine.TITLE}={image_engine.REPOSITORY}", "somebody=else"):
        (tmp_path / "Dockerfile").write_text(f"FROM scratch\nCOPY x /{len(ids)}\n")
        build = ["/usr/bin/docker", "build", "--quiet", "--label", label, str(tmp_path)]
        made = subprocess.run(build, check=True, capture_output=True, text=True)
        ids.append(made.stdout.strip())
    found = {image.id for image in prune.replaced(client)}
    assert ids[0] in found
    assert ids[1] not in found
    for image in prune.replaced(client):
        if image.id == ids[0]:
            prune.remove(client, image)
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(ids[0])
    client.images.remove(ids[1])
