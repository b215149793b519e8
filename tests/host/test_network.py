"""A replica's line is counted, narrow when it is made so, and leads to a server of ours."""

from __future__ import annotations

import time

import pytest

from hubserver import COMMIT, Hub
from replica.network import gateway, kill_work, lead_here, shape, traffic
from replica.replica import Replica

pytestmark = pytest.mark.host

BYTES = 20_000_000


def test_bytes_of_a_server_here_come_through_the_line_at_its_rate(autodl: Replica) -> None:
    with Hub(gateway()) as hub:
        hub.add("org/some", {"model.safetensors": bytes(BYTES)})
        address = f"http://127.0.0.1:{hub.port}/org/some/resolve/{COMMIT}/model.safetensors"

        def fetch() -> tuple[str, float]:
            began = time.monotonic()
            got = autodl.sh(f"curl -s {address} | wc -c", check=False).strip()
            return got, time.monotonic() - began

        assert fetch()[0] == "0", "nothing leads to it"
        lead_here(autodl, hub.port)
        before = traffic(autodl)
        got, _ = fetch()
        came = traffic(autodl) - before
        assert got == str(BYTES)
        assert BYTES < came.received < 1.005 * BYTES
        assert came.received < came.frames < 1.06 * BYTES
        assert came.own < 100_000
        shape(autodl, "80mbit", "40mbit")
        got, seconds = fetch()
        assert got == str(BYTES)
        assert seconds > 1.8, "20 MB at 10 MB/s, less the bucket"
    began = time.monotonic()
    sent = traffic(autodl).sent
    assert len(autodl.ssh(f"head -c {BYTES // 2} /dev/zero | tr '\\0' x").stdout) == BYTES // 2
    assert time.monotonic() - began > 1.8, "10 MB at 5 MB/s"
    assert BYTES / 2 < traffic(autodl).sent - sent < 1.2 * BYTES / 2


def test_a_kill_takes_the_work_and_leaves_the_host(autodl: Replica) -> None:
    autodl.sh("for n in 1 2 3; do setsid sleep 1000 & done")
    assert kill_work(autodl) >= 3
    assert autodl.sh("pgrep -c sleep", check=False).strip() == "0"
    assert kill_work(autodl) == 0
    assert autodl.ssh("echo here").stdout == "here\n"
    assert autodl.sh("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8099/").strip() == (
        "200"
    )
