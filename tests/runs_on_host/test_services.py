"""LLaMA Board of a host, through the tunnel, in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cli
from cli import Client, until
from replica.replica import Replica
from replica_fixtures import PROVISIONED, HostProject
from tunesmith.hosts import layout
from tunesmith.hosts.remote import Remote
from tunesmith.job.services.manager import http_status
from webclient import (
    FOREIGN,
    LOOPBACK_HEX,
    assert_refused,
    choose,
    chromium,
    listeners,
    preview,
    status_of,
)

pytestmark = pytest.mark.host

MODEL = "SmolLM2-135M-Instruct"
_SSHD = ("00000000", 22), ("0" * 32, 22)


@pytest.fixture
def client(
    provisioned_host: tuple[HostProject, Replica], tmp_path: Path
) -> Iterator[Callable[..., Client]]:
    """Start an `inv` that stays, in the clone that knows the host."""
    made, _ = provisioned_host
    with cli.clients(made.project.root, made.environment) as start:
        yield start
    made.inv("webui", "--on", PROVISIONED, "--stop")


def there(replica: Replica) -> set[tuple[str, int]]:
    """Who listens on the host, without its own sshd."""
    tables = replica.sh("cat /proc/net/tcp /proc/net/tcp6 2>/dev/null", check=False)
    return listeners(tables) - set(_SSHD)


def here() -> set[tuple[str, int]]:
    """Who listens on this machine."""
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    return listeners("\n".join(table.read_text() for table in tables if table.exists()))


def reaches(replica: Replica, port: int) -> bool:
    """Whether a port of this machine can be reached from the host's network namespace."""
    gateway = "$(awk '$2 == \"00000000\" { print $3 }' /proc/net/route | head -n 1)"
    script = (
        f"g={gateway}; ip=$(printf '%d.%d.%d.%d' "
        f"0x$(echo $g | cut -c7-8) 0x$(echo $g | cut -c5-6) 0x$(echo $g | cut -c3-4) "
        f'0x$(echo $g | cut -c1-2)); timeout 5 bash -c "</dev/tcp/$ip/{port}" && echo yes'
    )
    return replica.sh(script, check=False).strip() == "yes"


def tunnels(config: Path) -> list[int]:
    """Return the ids of the tunnels' ssh processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"-N" in words and str(config).encode() in words:
                found.append(int(folder.name))
    return found


def test_the_board_of_a_host_through_the_tunnel(
    provisioned_host: tuple[HostProject, Replica], client: Callable[..., Client], tmp_path: Path
) -> None:
    made, replica = provisioned_host
    config = made.inventory / "ssh_config"
    data = made.project.root / "data"
    known = json.loads((data / "dataset_info.json").read_text())
    known["mine"] = {"file_name": "mine/rows.json"}
    (data / "dataset_info.json").write_text(json.dumps(known))
    (data / "mine").mkdir()
    rows = [{"instruction": "q", "input": "", "output": "a"}]
    (data / "mine" / "rows.json").write_text(json.dumps(rows))
    before = there(replica)

    opened = client("webui", "--on", PROVISIONED, "--no-open")
    url, port = opened.url(), opened.port
    services = f"{layout.look(Remote(PROVISIONED, made.inventory)).base}/services"
    key = replica.sh(f"cat {services}/webui.key").strip()
    assert http_status(port, "/", key) == 200
    # Loopback of the host is that of all its users.
    assert http_status(port, "/") == 403
    assert status_of(port, "/", ("Authorization", f"Bearer {key}"), ("Host", FOREIGN)) == 421
    modes = replica.sh(f"stat -c '%a %n' {services} {services}/webui.* {services}/webui.tokens/*")
    assert {line.split()[0] for line in modes.splitlines()} == {"600", "700"}, modes
    token = opened.address().partition("?token=")[2]
    shown = replica.sh("cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '")
    assert "tunesmith.job.services.board" in shown
    assert key not in shown and token not in shown

    # Loopback on both ends, and nowhere else.
    new = there(replica) - before
    assert new
    assert {address for address, _ in new} <= LOOPBACK_HEX
    assert {address for address, at in here() if at == port} == {"0100007F"}
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        assert reaches(replica, everywhere.getsockname()[1]), "the way from there to here"
    assert not reaches(replica, port)

    with chromium(opened.address()) as page:
        assert page.url == f"{url}/"
        assert_refused(page, port, ("/", "/gradio_api/queue/join"))
        offered = choose(page, "Dataset", "philosophy_conch")
        assert {"philosophy_conch", "mine"} <= set(offered)
        page.get_by_label("Model name", exact=True).first.fill(MODEL)
        page.get_by_role("option", name=MODEL, exact=True).first.click()
        until(page.get_by_label("Model path").first.input_value, "the model's path")
        command = preview(page)
        assert "--dataset philosophy_conch" in command
        assert "trust_remote_code" not in command
        picture = tmp_path / "board.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 50_000
        if kept := os.environ.get("TUNESMITH_PICTURES"):
            Path(kept, "board.png").write_bytes(picture.read_bytes())

    # Connections that break: ours from this end, all from that end.
    [ssh] = tunnels(config)
    os.kill(ssh, signal.SIGKILL)
    until(lambda: opened.said.count("connected again") == 1, opened.said, 120)
    assert http_status(port, "/", key) == 200
    # Those without a command are only called `sshd: root`.
    replica.sh("pkill -KILL -f '^sshd: root'")
    until(lambda: opened.said.count("connected again") == 2, opened.said, 120)
    assert http_status(port, "/", key) == 200
    lost = r"gpu1: the connection to \S+ was lost \(.*\).*; connecting again"
    assert re.search(lost, opened.said)

    # A terminal that is closed takes the tunnel along, not the Board.
    owner = replica.sh("pgrep -f '[t]unesmith.job.services.board'")
    opened.process.send_signal(signal.SIGHUP)
    assert opened.end(120) == 0
    assert not tunnels(config)
    again = client("webui", "--on", PROVISIONED, "--no-open")
    assert http_status(again.port, "/", key) == 200
    assert opened.address().partition("?")[2] != again.address().partition("?")[2]
    assert "LLaMA Board is there already" in again.said
    assert replica.sh("pgrep -f '[t]unesmith.job.services.board'") == owner

    # Nor does a killed client leave a tunnel behind.
    again.process.kill()
    until(lambda: not tunnels(config), "the end of the tunnel", 60)

    # Ctrl-C ends both.
    last = client("webui", "--on", PROVISIONED, "--no-open")
    port = last.port
    assert last.interrupt() == 0
    assert f"{PROVISIONED}: LLaMA Board is ended" in last.said
    assert there(replica) == before
    assert not tunnels(config)
    assert http_status(port, "/") is None
    assert replica.sh("pgrep -f '[t]unesmith.job.services.board'", check=False) == ""


def test_any_port_of_the_host(client: Callable[..., Client]) -> None:
    opened = client("tunnel", "--on", PROVISIONED, "8099")  # the replica's mirror
    opened.wait_for("Ctrl-C ends the tunnel")
    found = re.search(r"http://127\.0\.0\.1:(\d+)", opened.said)
    assert found
    assert http_status(int(found[1]), "/") is not None
    assert opened.interrupt() == 0
    assert http_status(int(found[1]), "/") is None


def test_wrong_states_are_one_line_with_the_command(
    provisioned_host: tuple[HostProject, Replica], new_replica: Callable[..., Replica]
) -> None:
    made, _ = provisioned_host
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        done = made.inv("webui", "--on", PROVISIONED, "--port", str(port), "--no-open")
        assert f"port {port} of this machine is taken" in cli.refusal(done)
    bare = new_replica()
    added = made.inv("host.add", "bare", bare.address, "--identity", str(made.key))
    assert added.returncode == 0, added.stderr
    done = made.inv("webui", "--on", "bare", "--no-open")
    said = cli.refusal(done)
    assert "bare is not provisioned" in said
    assert "`inv provision --on bare`" in said
    bare.off()
    done = made.inv("tunnel", "8099", "--on", "bare")
    assert '`inv host.add bare "ssh ..."`' in cli.refusal(done, code=1)
    assert made.inv("host.remove", "bare").returncode == 0
    done = made.inv("tunnel", "0x10", "--on", PROVISIONED)
    assert done.returncode == 2
