"""The network of a replica host: counted, as narrow as a rented line, and led to a server here."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from replica.engine import docker
from replica.replica import Replica

# What is no work of a user's: how the platform runs, and what serves the replica itself.
_PLATFORM = ("/init/", "bash /init/", "sshd: /usr/sbin/sshd")
# Of a frame: Ethernet's, IP's and TCP's, which has time stamps.
_HEADERS = 14 + 20 + 32


@dataclass(frozen=True)
class Traffic:
    """Bytes on eth0 since the host was started, both ways, and those on lo.

    `received` is what programs get of it: `frames` less the headers of each packet. On lo the
    conda channel is served, which stands on the replica itself.
    """

    received: int
    frames: int
    sent: int
    own: int

    def __sub__(self, before: Traffic) -> Traffic:
        """Return what came between two looks."""
        return Traffic(
            self.received - before.received,
            self.frames - before.frames,
            self.sent - before.sent,
            self.own - before.own,
        )

    @property
    def arrived(self) -> int:
        """All bytes that the host has got, from wherever."""
        return self.received + self.own


def traffic(host: Replica) -> Traffic:
    """Return the counters of the host's interfaces, as its kernel keeps them."""
    counters = ("eth0/statistics/rx_bytes", "eth0/statistics/rx_packets")
    counters += ("eth0/statistics/tx_bytes", "lo/statistics/rx_bytes")
    told = host.sh(f"cd /sys/class/net && cat {' '.join(counters)}").split()
    frames, packets, sent, own = map(int, told)
    return Traffic(frames - packets * _HEADERS, frames, sent, own)


def shape(host: Replica, to_host: str, from_host: str) -> None:
    """Let no more come through its line than these rates of `tc` ("1gbit", "100mbit").

    A token bucket on either end of the host's interface; the kernel's queue holds 50 ms more.
    """
    pid = _pid(host)
    outer = host.sh("cat /sys/class/net/eth0/iflink").strip()
    (device,) = (
        path.parent.name
        for path in Path("/sys/class/net").glob("*/ifindex")
        if path.read_text().strip() == outer
    )
    limits = ("root", "tbf", "latency", "50ms", "burst", "256kb", "rate")
    _run("tc", "qdisc", "replace", "dev", device, *limits, to_host)
    _inside(pid, "tc", "qdisc", "replace", "dev", "eth0", *limits, from_host)


def gateway() -> str:
    """Return the address of this machine as replica hosts see it.

    Of the bridge itself: not every engine names a gateway in the network's settings.
    """
    shown = docker("network", "inspect", "bridge", "--format", "{{json .Options}}").stdout
    bridge = (json.loads(shown) or {}).get("com.docker.network.bridge.name", "docker0")
    told = subprocess.run(
        ["ip", "-json", "-4", "address", "show", "dev", bridge],
        check=True,
        capture_output=True,
        text=True,
    )
    address: str = json.loads(told.stdout)[0]["addr_info"][0]["local"]
    return address


def lead_here(host: Replica, port: int) -> None:
    """Let the host find at 127.0.0.1:PORT what listens at that port of `gateway`.

    Through its line: mirrors may speak plain http with 127.0.0.1 only.
    """
    pid, to = _pid(host), gateway()
    _inside(pid, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet")
    table = ("iptables", "-w", "-t", "nat", "-A")
    same = ("-p", "tcp", "--dport", str(port))
    _inside(pid, *table, "OUTPUT", "-d", "127.0.0.1", *same, "-j", "DNAT", "--to-destination", to)
    _inside(pid, *table, "POSTROUTING", "-d", to, *same, "-j", "MASQUERADE")


def kill_work(host: Replica) -> int:
    """Send SIGKILL to every process that is not the platform's own; return how many there were."""
    words = "|".join(f"'{start}'*" for start in _PLATFORM)
    # Twice: what was forked meanwhile. The shell that does it is none of them.
    script = f"""
    for round in 1 2; do
        for folder in /proc/[0-9]*; do
            pid=${{folder#/proc/}}
            [ "$pid" != $$ ] && [ "$pid" != 1 ] || continue
            said=$(tr '\\0' ' ' 2>/dev/null <"$folder/cmdline")
            case $said in '' | {words}) continue ;; esac
            kill -KILL "$pid" 2>/dev/null && echo "$pid $said"
        done
    done
    true
    """
    return len(host.sh(script).splitlines())


def _pid(host: Replica) -> str:
    return docker("inspect", "--format", "{{.State.Pid}}", host.container).stdout.strip()


def _inside(pid: str, *words: str) -> None:
    _run("nsenter", "--net", "--target", pid, *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
