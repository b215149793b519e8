"""The line a rental console shows: read whole, and nothing in it can run a command."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.hosts.address import Address, Hop, parse_address, parse_jump, resolve

pytestmark = pytest.mark.unit

ROOT = Address("connect.example.com", 42151, "root")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh -p 42151 root@connect.example.com", ROOT),
        ("  ssh   -p42151 root@connect.example.com \n", ROOT),
        ("ssh root@connect.example.com -p 42151", ROOT),
        ("ssh -p 42151 \\\n  root@connect.example.com", ROOT),
        ("ssh -p 42151\r\nroot@connect.example.com", ROOT),
        ("ssh -l root -o Port=42151 connect.example.com", ROOT),
        ('ssh -o "Port 42151" "root@connect.example.com"', ROOT),
        ("ssh ssh://root@connect.example.com:42151", ROOT),
        ("ssh://root@connect.example.com:42151/", ROOT),
        ("root@connect.example.com:42151", ROOT),
        ("ssh -o HostName=connect.example.com -p 42151 root@gpu", ROOT),
        ("connect.example.com", Address("connect.example.com")),
        ("gpu_1", Address("gpu_1")),
        ("root@[2001:db8::1]:2222", Address("2001:db8::1", 2222, "root")),
        ("[fe80::1%eth0]:22", Address("fe80::1%eth0")),
        ("root@2001:db8::1", Address("2001:db8::1", 22, "root")),
        ("abc-6441@ssh.example.io", Address("ssh.example.io", 22, "abc-6441")),
        ("u@asset@gate.example:2222", Address("gate.example", 2222, "u@asset")),
        (
            "ssh -J ops@gate.example:2200,inner -p 22 root@10.0.0.7",
            Address("10.0.0.7", 22, "root", jump="ops@gate.example:2200,inner"),
        ),
        (
            'ssh -i "/keys/my key.pem" ubuntu@203.0.113.7',
            Address("203.0.113.7", 22, "ubuntu", Path("/keys/my key.pem")),
        ),
    ],
)
def test_what_consoles_show(text: str, expected: Address) -> None:
    assert parse_address(text) == expected


def test_what_is_not_about_the_place_is_named_and_left_out() -> None:
    found = parse_address(
        "ssh -CNg -L 6006:127.0.0.1:6006 -p 42151 -o StrictHostKeyChecking=no "
        "root@connect.example.com"
    )
    assert (found.host, found.port, found.user) == ("connect.example.com", 42151, "root")
    assert found.ignored == (
        "-C",
        "-N",
        "-g",
        "-L 6006:127.0.0.1:6006",
        "-o StrictHostKeyChecking=no",
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh",
        "ssh -p",
        "ssh -p 42151",
        "-oProxyCommand=touch x",
        "ssh -oProxyCommand='touch x' host",
        "ssh -o ProxyCommand='touch x' host",
        "ssh -o 'proxycommand touch x' host",
        "ssh -o LocalCommand=x -o PermitLocalCommand=yes host",
        "ssh -o KnownHostsCommand=/bin/x host",
        "ssh -F /tmp/config host",
        "ssh -S /tmp/socket host",
        "ssh -E /tmp/log host",
        "ssh -w 0 host",
        "ssh -- -oProxyCommand=x",
        "ssh -- host",
        "ssh host rm -rf /",
        "ssh 'a b'",
        "ssh '-host'",
        "ssh root@-oProxyCommand=x",
        "ssh '-l root' -p 1 'x;y'",
        "ssh -l '-oProxyCommand=x' host",
        "ssh -l 'a b' host",
        "ssh -J '-oProxyCommand=x' host",
        "ssh -J 'gate;x' host",
        "ssh -J gate,,other host",
        "ssh -i '-x' host",
        "ssh -i '/a\x01b' host",
        "ssh 'root@ho\nst'",
        "ssh $(touch x)",
        "root@$(touch x)",
        "root@host`x`",
        "root@host:22;x",
        "root@host:",
        "root@host:0",
        "root@host:65536",
        "root@host:٤٢",
        "root@host:22:23",
        "root@[::1",
        "root@[::1]22",
        "[not six]:22",
        "@host",
        "$USER@host",
        "root@host extra",
        "ssh 'unclosed",
        "http://host:22",
        "ssh://root@host/path",
        "host\x00",
        "höst",
        "a" * 64,
        "a..b",
        ".".join(["a" * 60] * 5),
    ],
)
def test_hostile_or_broken_input_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["root:hunter2@host", "ssh://root:hunter2@host:22", "sshpass -p hunter2 ssh root@host"]
)
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="password") as caught:
        parse_address(text)
    assert "hunter2" not in caught.value.render()


def test_text_for_people() -> None:
    assert ROOT.text == "root@connect.example.com:42151"
    assert Address("::1", 22).text == "[::1]:22"
    assert Address("h", jump="gate").text == "h:22 through gate"


def test_hops_of_a_jump() -> None:
    assert parse_jump("ops@gate:2200,inner") == (Hop("gate", 2200, "ops"), Hop("inner"))
    assert [hop.text for hop in parse_jump("ops@[::1]:2200,inner")] == ["ops@[::1]:2200", "inner"]


CONFIG = """\
Host gpu
  HostName 203.0.113.9
  Port 42151
  User root
  IdentityFile /keys/rented
  ProxyJump ops@gate.example
Host *.lan
  ProxyCommand nc %h %p
Host bad
  HostName -oProxyCommand=x
Host token
  IdentityFile %d/key
"""


def test_an_alias_is_resolved_by_ssh_itself(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(CONFIG)
    found = resolve(parse_address("ssh gpu"), config)
    assert found == Address("203.0.113.9", 42151, "root", Path("/keys/rented"), "ops@gate.example")
    own = resolve(parse_address("ssh -p 7 -l me -i /keys/mine -J other gpu"), config)
    assert own == Address("203.0.113.9", 7, "me", Path("/keys/mine"), "other")


def test_a_host_without_a_block_stays_what_it_is(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(CONFIG)
    assert resolve(ROOT, config) == ROOT
    me = pwd.getpwuid(os.getuid()).pw_name
    assert resolve(Address("plain.example"), config) == Address("plain.example", user=me)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x.lan", "ProxyCommand"), ("bad", "no host name"), ("token", "names its key")],
)
def test_a_config_that_runs_a_command_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    config = tmp_path / "config"
    config.write_text(CONFIG)
    with pytest.raises(UsageError, match=reason):
        resolve(Address(name), config)
