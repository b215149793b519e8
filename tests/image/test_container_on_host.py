"""A host whose jobs run in a container of the image: `inv host.add --runner container`.

The host is a replica with the machine's engine, reached through a socket on its data disk,
which lies under the same path on both. Runs are watched, stopped and continued by the code
that is used for any host, so only what is special here is asked.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

import cli
import replica_fixtures
from cli import until
from image.conftest import Built, fill
from replica.build import Images
from replica.engine import state
from replica.replica import Options, Replica, start
from replica_fixtures import HostProject, clone
from tunesmith.job.services.manager import MODULES, http_status
from tunesmith.services.service import KINDS
from webclient import FOREIGN, LOOPBACK_HEX, listeners, status_of

pytestmark = pytest.mark.image

HOST = "vm1"
UID = 1000  # of the replica's user
STANDINS = Path(__file__).resolve().parent.parent / "standins"


@dataclass(frozen=True)
class Boxed:
    """The host, the clone that knows it, and a user's folder."""

    made: HostProject
    replica: Replica
    base: Path
    user: Path
    client: docker.DockerClient

    def inv(self, *words: str, code: int = 0) -> str:
        return replica_fixtures.inv(self.made, *words, code=code)

    def train(self, run: str, *words: str) -> str:
        config = ("--config", str(self.user / "tiny.yaml"), f"dataset_dir={self.user}/data")
        model = ("--from-laptop", str(self.user / "model"), "model_name_or_path=me/tiny")
        return self.inv("train", "--on", HOST, "--run", run, *config, *model, *words)

    def container(self) -> docker.models.containers.Container:
        found = self.client.containers.list(filters={"label": "tunesmith.environment"})
        (own,) = [one for one in found if str(self.base) in str(one.attrs["Mounts"])]
        return own

    def processes(self, word: str) -> list[str]:
        """Return the commands that run in the container and have a word in them."""
        shown = self.container().top(ps_args="-ww -eo pid,args")
        return [line[-1] for line in shown["Processes"] if word in line[-1]]

    def listening(self) -> set[tuple[str, int]]:
        """Return who listens on the host, whose network the container has."""
        return listeners(self.replica.sh("cat /proc/net/tcp /proc/net/tcp6"))


@pytest.fixture(scope="module")
def boxed(
    built: Built,
    images: Images,
    root: Path,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Boxed]:
    made = clone(images, root, tmp_path_factory.mktemp("boxed"))
    user = tmp_path_factory.mktemp("user") / "folder"
    fill(user, tiny_model, owner=os.getuid())
    name = secrets.token_hex(4)
    # The same path on both, which the replica's user may enter wherever the clone lies.
    disk = Path("/var/tmp") / f"tunesmith-{name}"
    disk.symlink_to(state() / "disks" / name)
    replica = start(images, Options("vm", data_disk=str(disk)), name, owner=os.getpid())
    argv = [sys.executable, str(STANDINS / "docker_socket.py"), str(disk / "docker.sock")]
    argv.append(replica.container)
    engine = subprocess.Popen(argv, start_new_session=True)
    try:
        subprocess.run(
            ["docker", "cp", "/usr/bin/docker", f"{replica.container}:/usr/bin/docker"], check=True
        )
        # Its home is where the engine sees it, too.
        replica.sh(
            f"rm -rf /data; cp -a /home/ubuntu {disk}/home; usermod -d {disk}/home ubuntu; "
            f"ln -s {disk}/docker.sock /var/run/docker.sock"
        )
        base = disk / "home" / "tunesmith"
        host = Boxed(made, replica, base, user, built.client)
        host.inv(
            *("host.add", HOST, replica.address, "--identity", str(made.key)),
            *("--runner", "container"),
        )
        host.inv("provision", "--on", HOST)
        yield host
        for one in built.client.containers.list(all=True):
            if str(base) in str(one.attrs["Mounts"]) and one.name != replica.container:
                one.remove(force=True)
    finally:
        engine.terminate()
        engine.wait()
        replica.destroy()
        disk.unlink()


def test_provisioning_again_changes_nothing_and_says_so(boxed: Boxed) -> None:
    before = boxed.container().id
    assert "in state (container" in boxed.inv("provision", "--on", HOST)
    assert boxed.container().id == before
    # The console shows another address: what jobs run in stays.
    words = ("host.add", HOST, boxed.replica.address, "--identity", str(boxed.made.key))
    boxed.inv(*words)
    assert "runner: container" in (boxed.made.inventory / "hosts.yml").read_text()
    hardened = boxed.container().attrs["HostConfig"]
    assert hardened["ReadonlyRootfs"]
    assert hardened["CapDrop"] == ["ALL"]


def test_a_run_in_the_container_is_like_any_other(boxed: Boxed) -> None:
    said = boxed.train("one", "--then", "merge,pull", "max_steps=6", "save_steps=3")
    for phase in ("fetch", "train", "merge", "proof"):
        assert f"{phase}: succeeded" in said
    assert "pulled: " in said
    pulled = boxed.made.project.runs / "one"
    assert (pulled / "merged" / "model.safetensors").is_file()
    run = boxed.base / "runs" / "one"
    assert {path.stat().st_uid for path in run.rglob("*")} == {UID}
    words = ("--what", "merged", "--greedy", "--max-new-tokens", "4", "--prompt", "Say river")
    boxed.inv("chat", "--on", HOST, "--run", "one", *words)


def test_a_restart_of_the_engine_costs_no_more_than_save_steps(boxed: Boxed) -> None:
    boxed.train("two", "--no-attach", "max_steps=3000", "save_steps=5")
    heartbeat = boxed.base / "runs" / "two" / "heartbeat.json"
    deadline = time.monotonic() + 120
    while not heartbeat.exists() or (json.loads(heartbeat.read_text()).get("step") or 0) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    refused = boxed.inv("provision", "--on", HOST, "--mirror", "cn", code=2)
    assert "run two is using the container that must be replaced" in refused
    boxed.container().restart(timeout=0)
    (two,) = [
        run
        for run in json.loads(boxed.inv("runs", "--on", HOST, "--json"))
        if run["run_id"] == "two"
    ]
    assert (two["state"], two["failure"]) == ("failed", "killed")
    last = json.loads(heartbeat.read_text())["step"]
    resumed = cli.Client(boxed.made.project.root, boxed.made.environment, "resume", "--on", HOST)
    line = resumed.lines[resumed.wait_for("^resumed at step ", seconds=600)]
    assert 0 <= last - int(line.split()[3].split("/")[0]) <= 5
    boxed.inv("stop", "--on", HOST, "--run", "two")
    resumed.end(60)


@pytest.mark.parametrize("name", ["webui", "api", "tensorboard"])
def test_a_web_service_in_the_container_and_the_way_to_it(
    boxed: Boxed, name: str, tmp_path: Path
) -> None:
    """It runs in the container, on the host's loopback; Ctrl-C ends it and the tunnel."""
    kind = KINDS[name]
    before = boxed.listening()
    words = (name, "--on", HOST, *(("--run", "one") if name == "api" else ("--no-open",)))
    opened = cli.Client(boxed.made.project.root, boxed.made.environment, *words)
    try:
        port = opened.port
        said = opened.said
        key = (boxed.base / "services" / f"{name}.key").read_text()
        assert http_status(port, kind.path, key) == 200
        own = ("Authorization", f"Bearer {key}")
        assert status_of(port, kind.path, own, ("Host", FOREIGN)) == 421
        assert status_of(port, kind.path, own, ("Origin", f"http://{FOREIGN}")) == 403
        if name == "api":
            assert http_status(port, kind.path) == 401
            assert f"export API_KEY={key}" in said and "model one (adapter)" in said
        else:
            assert http_status(port, kind.path) == 403
            token = opened.address().partition("/?token=")[2]
            assert status_of(port, f"/?token={token}") == 200
            assert status_of(port, f"/?token={token}") == 403, "it works once"
        new = boxed.listening() - before
        assert new
        assert {address for address, _ in new} <= LOOPBACK_HEX
        assert boxed.processes(f"tunesmith.job.services.{MODULES[name]}")
        assert opened.interrupt() == 0
        assert f"{HOST}: {kind.title} is ended" in opened.said
    finally:
        opened.kill()
    assert http_status(port, kind.path, key) is None
    assert boxed.listening() == before
    assert not boxed.processes(f"tunesmith.job.services.{MODULES[name]}")


# A Board that trains: its record, and the command that it starts below itself.
_TRAINING = """
import subprocess, sys, time
from pathlib import Path
from tunesmith.core.files import write_json
from tunesmith.job.run.process import identify
cli = Path("/tmp/llamafactory-cli")
cli.write_text("import time; time.sleep(600)")
subprocess.Popen([sys.executable, cli, "train", "saves/tiny/training_args.yaml"])
record = {"name": "webui", "port": 9, "process": identify().to_json(), "serves": {}}
write_json(Path("services/webui.json"), record)
time.sleep(600)
"""


def test_a_container_in_which_the_board_trains_is_not_replaced(boxed: Boxed) -> None:
    """Other sources of ours do not keep from ending it: else there were no way out."""
    own = boxed.container()
    own.exec_run(["python", "-c", _TRAINING], detach=True)
    record = boxed.base / "services" / "webui.json"
    until(lambda: boxed.processes("llamafactory-cli") and record.is_file(), "the training")
    for words in (("provision", "--on", HOST, "--mirror", "cn"), ("host.reset", "--on", HOST)):
        told = boxed.inv(*words, code=2)
        assert "LLaMA Board is training saves/tiny in the container that must be replaced" in told
        assert f"`inv webui --on {HOST} --stop`" in told
    source = boxed.made.project.root / "src/tunesmith/core/errors.py"
    text = source.read_text()
    source.write_text(f"{text}# another line\n")
    try:
        assert "runs a different tunesmith version" in boxed.inv(
            "webui", "--on", HOST, "--no-open", code=2
        )
        assert "its training in saves/tiny was ended too" in boxed.inv(
            "webui", "--on", HOST, "--stop"
        )
    finally:
        source.write_text(text)
    assert not boxed.processes("llamafactory-cli")
    assert boxed.container().id == own.id


def test_what_a_container_cannot_is_refused(boxed: Boxed) -> None:
    config = ("--config", str(boxed.user / "tiny.yaml"), f"dataset_dir={boxed.user}/data")
    words = ("train", "--on", HOST, "--then", "pull,poweroff", *config)
    assert "cannot power the host off" in boxed.inv(*words, code=2)
    assert "`inv image.verify` tests" in boxed.inv("host.verify", "--on", HOST, code=2)
    said = boxed.inv("provision", "--on", HOST, "--toolkit", code=2)
    assert "are for conda" in said
    said = boxed.inv("host.add", "x", "ssh a@b", "--runner", "podman", code=2)
    assert "--runner takes conda, container" in said


def test_a_reset_removes_the_container_and_leaves_the_runs(boxed: Boxed) -> None:
    name = boxed.container().name
    assert (boxed.base / "services").is_dir()
    assert "the container is gone" in boxed.inv("host.reset", "--on", HOST)
    assert not (boxed.base / "services").exists()
    with pytest.raises(docker.errors.NotFound):
        boxed.client.containers.get(name)
    assert (boxed.base / "runs" / "one" / "run.json").is_file()
    assert "is not provisioned" in boxed.inv("runs", "--on", HOST, code=2)
