"""Tunnels: what ssh is asked for, and which local port; and what services are asked for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.local_hosts import local_hosts
from tunesmith.cli import serving
from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts.remote import Remote
from tunesmith.project import Project
from tunesmith.services import service
from tunesmith.services.service import KINDS, Folders
from tunesmith.services.tunnel import Tunnel, free_port, reopen
from tunesmith.targets import factory

pytestmark = pytest.mark.unit


@pytest.fixture
def remote(root: Path, tmp_path: Path) -> Remote:
    return Remote("gpu1", local_hosts(root, tmp_path, ("gpu1",)).inventory)


@pytest.fixture
def taken() -> Any:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_the_tunnel_is_bound_on_loopback_on_both_ends(remote: Remote) -> None:
    argv = Tunnel(remote, 7860, 7861).argv()
    assert argv[argv.index("-L") + 1] == "127.0.0.1:7861:127.0.0.1:7860"
    options = {argv[i + 1] for i, word in enumerate(argv) if word == "-o"}
    assert {"GatewayPorts=no", "ExitOnForwardFailure=yes", "ControlMaster=no"} <= options
    assert {"ControlPath=none", "BatchMode=yes"} <= options
    assert "-g" not in argv and argv[-1] == "gpu1" and "-N" in argv


def test_ssh_itself_reads_the_options_so(remote: Remote) -> None:
    """`ssh -G` prints what counts in the end, whatever the inventory's ssh_config says."""
    remote.config.write_text(
        "Host gpu1\n  HostName 127.0.0.1\n  GatewayPorts yes\n  ControlMaster auto\n"
        "  ControlPath ~/.ssh/kept-%C\n"
    )
    argv = Tunnel(remote, 7860, 7861).argv()
    shown = subprocess.run([argv[0], "-G", *argv[1:]], capture_output=True, text=True, check=True)
    said = dict(line.split(" ", 1) for line in shown.stdout.splitlines() if " " in line)
    assert said["gatewayports"] == "no"
    assert said["exitonforwardfailure"] == "yes"
    assert said["controlmaster"] == "false"
    assert said["localforward"] == "[127.0.0.1]:7861 [127.0.0.1]:7860"
    assert said.get("controlpath", "none") == "none"


def test_a_wanted_port_that_is_taken_is_refused(taken: int) -> None:
    with pytest.raises(UsageError, match=f"port {taken} of this machine is taken"):
        free_port(taken)
    with pytest.raises(UsageError, match="from 1 to 65535"):
        free_port(70000)


def test_a_usual_port_that_is_taken_gives_way(taken: int) -> None:
    found = free_port(None, taken)
    assert found != taken
    assert free_port(found) == found


def test_a_host_that_is_off_is_told(remote: Remote) -> None:
    way = Tunnel(remote, 7860, free_port(None))
    with pytest.raises(TunesmithError, match=r"gpu1: root@gpu1.example.com:22 is off"):
        way.open()
    way.close()
    assert not way.alive()


def test_reopening_tells_a_reason_once_and_ends_where_trying_cannot_help(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.services.tunnel.PAUSES", (0.01,))
    told: list[str] = []
    way = Tunnel(remote, 7860, free_port(None))
    # Each second time a banner comes first: the same reason, and other words of ssh for it.
    tries = "echo x >>tries; [ $(($(wc -l <tries) %% 2)) = 1 ] || echo SSH-2.0-x; "
    remote.config.write_text(
        f"Host gpu1\n  HostName 127.0.0.1\n  ProxyCommand sh -c 'cd {remote.config.parent}; "
        f"{tries} echo Connection refused >&2'\n"
    )
    with pytest.raises(TunesmithError):
        way.open()
    with socket.socket() as other:

        def attempts() -> int:
            return len((remote.config.parent / "tries").read_text().splitlines())

        def take_it() -> None:
            until = time.monotonic() + 60
            while attempts() < 4 and time.monotonic() < until:
                time.sleep(0.005)
            other.bind(("127.0.0.1", way.here))
            other.listen()

        thief = threading.Thread(target=take_it)
        thief.start()
        with pytest.raises(UsageError, match=f"port {way.here} of this machine is taken"):
            reopen(way, told.append)
        thief.join()
    assert len(told) == 1 and told[0].endswith("; connecting again")


def test_a_port_that_another_has_taken_meanwhile_is_not_the_tunnel(remote: Remote) -> None:
    way = Tunnel(remote, 7860, free_port(None))
    begun = remote.config.parent / "begun"
    remote.config.write_text(
        "Host gpu1\n  HostName 127.0.0.1\n"
        f"  ProxyCommand sh -c 'touch {begun}; sleep 2; echo Connection refused >&2'\n"
    )
    with socket.socket() as other:

        def take_it() -> None:
            until = time.monotonic() + 60
            while not begun.exists() and time.monotonic() < until:
                time.sleep(0.005)
            other.bind(("127.0.0.1", way.here))
            other.listen()

        thief = threading.Thread(target=take_it)
        thief.start()
        with pytest.raises(TunesmithError):
            way.open()
        thief.join()
    way.close()


def data_folder(folder: Path, registry: object) -> Path:
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    return folder


def test_the_data_that_goes_along_is_what_the_registry_names(tmp_path: Path) -> None:
    registry = {
        "here": {"file_name": "here.json"},
        "folder": {"file_name": "many"},
        "hub": {"hf_hub_url": "owner/name"},
        "gone": {"file_name": "gone.json"},
        "outside": {"file_name": "../secret.json"},
        "absolute": {"file_name": "/etc/passwd"},
    }
    data = data_folder(tmp_path / "data", registry)
    (tmp_path / "secret.json").write_text("[]")
    (data / "here.json").write_text("[]")
    (data / "unregistered.json").write_text("[]")
    (data / "many" / "deep").mkdir(parents=True)
    for name in ("a.json", "deep/b.json"):
        (data / "many" / name).write_text("[]")
    entries, files, missing = service.registered(data)
    assert set(entries) == {"here", "folder", "hub"}
    assert set(files) == {"here.json", "many/a.json", "many/deep/b.json"}
    assert missing == [
        "gone (gone.json)",
        "outside (../secret.json)",
        "absolute (/etc/passwd)",
    ]


def test_a_registry_that_is_no_json_is_named(tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", {})
    (data / "dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match=r"dataset_info.json: not JSON"):
        service.registered(data)
    assert service.registered(tmp_path) == ({}, {}, [])


def test_one_target_at_a_time(root: Path) -> None:
    with pytest.raises(UsageError, match="only one target at a time"):
        factory.target_of(Project.at(root), "gpu1,gpu2", print)


class Access:
    """The services of a target that answers as told."""

    name = "gpu1"
    folders = Folders(*(Path(f"/there/{name}") for name in ("", "data", "models", "runs")))
    remote = None
    mends = "`inv provision --on gpu1`"

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, ...]] = []

    def ask(self, verb: str, *words: str, body: Any = None, timeout: float = 60) -> dict[str, Any]:
        self.asked.append((verb, *words))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stage_data(self, tell: OnText) -> dict[str, Any]:
        return {}

    def stage_packages(self, folder: Path, tell: OnText) -> Path:
        return folder


def test_a_service_that_does_not_come_up_says_the_end_of_its_log() -> None:
    tail = ["Traceback (most recent call last):", "OSError: no space left"]
    access = Access(
        {"reused": False, "log": "/there/webui.log"},
        {"state": "ended", "tail": tail, "log": "/there/webui.log"},
    )
    with pytest.raises(TunesmithError) as raised:
        service.start(access, KINDS["webui"], {}, lambda _: None)
    assert raised.value.message == (
        "gpu1: LLaMA Board ended while it started: OSError: no space left"
    )
    assert raised.value.hint == "`inv provision --on gpu1` repairs the environment"
    assert raised.value.detail == (tail[0], "log: /there/webui.log")


def test_a_refusal_that_names_its_command_names_no_other() -> None:
    access = Access(
        {"reused": False, "log": "x"},
        {
            "state": "ended",
            "tail": ["x", "refused: no merged model: `inv merge --run r`"],
            "log": "x",
        },
    )
    with pytest.raises(TunesmithError) as raised:
        service.start(access, KINDS["api"], {}, lambda _: None)
    assert raised.value.message == "gpu1: no merged model: `inv merge --run r`"
    assert raised.value.detail == ()


def test_another_model_is_not_served_in_place_of_the_one_asked_for() -> None:
    access = Access(UsageError("serves what adapter, run r1"))
    with pytest.raises(UsageError) as raised:
        service.start(access, KINDS["api"], {}, lambda _: None)
    assert raised.value.message == "the API of gpu1 serves what adapter, run r1"
    assert raised.value.hint == "end that one first: `inv api --on gpu1 --stop`"


def test_a_key_is_made_for_every_start() -> None:
    keys = {service.asked_of(Access(), kind)["key"] for kind in KINDS.values() for _ in range(3)}
    assert len(keys) == 9
    assert all(len(key) >= 43 for key in keys)


@pytest.mark.parametrize("key", ["$(canary)", "", "k" * 42, f"{'k' * 43}\n", ["k"] * 43, 7])
def test_a_key_of_another_make_is_not_taken_from_a_host(key: Any) -> None:
    """It is told for a shell, and goes into a header."""
    access = Access({"reused": True, "log": "x", "key": key})
    with pytest.raises(TunesmithError, match=r"^gpu1: the API answers with a key that is none"):
        service.start(access, KINDS["api"], {}, lambda _: None)
    assert access.asked == [("start", "api")]


def test_a_browser_is_opened_without_the_token_in_a_process_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    file = tmp_path / "services" / "open.html"
    umask = os.umask(0o022)
    try:
        serving._open(file, "http://127.0.0.1:7860/?token=secret")
    finally:
        os.umask(umask)
    assert opened == [file.as_uri()]
    assert file.stat().st_mode & 0o777 == 0o600
    assert "url=http://127.0.0.1:7860/?token=secret" in file.read_text()


def test_what_is_told_puts_no_secret_into_a_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {"serves": {"run": "r1", "what": "merged"}, "reused": False, "key": "k" * 43}
    serving._tell_more(Access(), KINDS["api"], "http://127.0.0.1:8", said, show_key=False)
    told = capsys.readouterr().out.splitlines()
    assert f"export API_KEY={'k' * 43}" in told
    [line] = [line for line in told if "curl" in line]
    # printf is the shell's own; what follows the pipe is a process.
    assert line.startswith('printf "Authorization: Bearer %s" "$API_KEY" | curl -H @- ')
    assert "API_KEY" not in line.partition("|")[2]


def test_the_board_speaks_the_users_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LC_ALL", raising=False)
    for said, language in (("zh_CN.UTF-8", "zh"), ("en_US.UTF-8", "en"), ("", "en")):
        monkeypatch.setenv("LANG", said)
        asked = service.asked_of(Access(), KINDS["webui"])
        assert asked["settings"]["language"] == language


def test_a_killed_client_leaves_no_tunnel_behind(
    root: Path, remote: Remote, tmp_path: Path
) -> None:
    """prctl(2) lets the kernel end ssh when nobody else can."""
    pid_file = tmp_path / "ssh.pid"
    remote.config.write_text(
        "Host gpu1\n  HostName 127.0.0.1\n"
        f"  ProxyCommand sh -c 'echo $PPID >{pid_file}; sleep 60'\n"
    )
    code = (
        "import sys; from pathlib import Path; from tunesmith.hosts.remote import Remote; "
        "from tunesmith.services.tunnel import Tunnel, free_port; "
        "Tunnel(Remote('gpu1', Path(sys.argv[1])), 7860, free_port(None)).open()"
    )
    argv = [sys.executable, "-c", code, str(remote.config.parent)]
    client = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(root / "src")})
    until = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text().strip()):
        assert time.monotonic() < until, "ssh did not begin"
        time.sleep(0.02)
    ssh = Path("/proc") / pid_file.read_text().strip() / "cmdline"
    assert b"-N" in ssh.read_bytes().split(b"\0")
    client.kill()
    client.wait()
    while ssh.exists() and ssh.read_bytes():
        assert time.monotonic() < until, "ssh lives on"
        time.sleep(0.02)
