"""ssh's own words, as OpenSSH printed them, and the kind each is."""

from __future__ import annotations

import pytest

from tunesmith.hosts.ssh_errors import kind_of, last_line, reason

pytestmark = pytest.mark.unit

CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for tunesmith-gpu1 has changed and you have requested strict checking.
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        (CHANGED, "changed"),
        (
            "No ED25519 host key is known for tunesmith-gpu1 and you have requested strict "
            "checking.\nHost key verification failed.\n",
            "unpinned",
        ),
        ("ssh: connect to host h port 1: Connection refused\n", "off"),
        ("ssh: connect to host h port 1: No route to host\n", "off"),
        ("ssh: connect to host h port 1: Network is unreachable\n", "off"),
        ("ssh: connect to host h port 1: Connection timed out\n", "blocked"),
        ("ssh: connect to host h port 1: Operation timed out\n", "blocked"),
        ("Connection timed out during banner exchange\n", "blocked"),
        ("ssh: Could not resolve hostname h: Name or service not known\n", "moved"),
        ("ssh: Could not resolve hostname h: Temporary failure in name resolution\n", "blocked"),
        ("kex_exchange_identification: Connection closed by remote host\n", "moved"),
        ("kex_exchange_identification: read: Connection reset by peer\n", "moved"),
        ("root@h: Permission denied (publickey,password).\n", "wrong_key"),
        ("Received disconnect from h port 1:2: Too many authentication failures\n", "wrong_key"),
        ("Connection to h closed by remote host.\n", "lost"),
        ("client_loop: send disconnect: Broken pipe\n", "lost"),
        ("Timeout, server h not responding.\n", "lost"),
        ("/x/ssh_config: line 3: Bad configuration option: foo\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_kinds(stderr: str, kind: str) -> None:
    assert kind_of(stderr) == kind


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("Host key verification failed.\nConnection closed by UNKNOWN port 65535\n", "jump"),
        (
            "ops@gate: Permission denied (publickey).\nConnection closed by UNKNOWN port 65535",
            "jump",
        ),
        (
            "ssh: connect to host gate port 22: Connection refused\n"
            "kex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by UNKNOWN port 65535\n",
            "jump",
        ),
        (
            "kex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by 10.0.0.1 port 22\n"
            "kex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by UNKNOWN port 65535\n",
            "jump",
        ),
        # The jump host's ssh has nothing to complain of: what it led to does not speak SSH.
        (
            "kex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by UNKNOWN port 65535\n",
            "moved",
        ),
        (
            "kex_exchange_identification: banner line contains invalid characters\n"
            "banner exchange: Connection to UNKNOWN port 65535: invalid format\n",
            "moved",
        ),
        (
            "channel 0: open failed: connect failed: Connection refused\n"
            "stdio forwarding failed\nConnection closed by UNKNOWN port 65535\n",
            "off",
        ),
        (
            "channel 0: open failed: administratively prohibited: open failed\n"
            "stdio forwarding failed\nConnection closed by UNKNOWN port 65535\n",
            "blocked",
        ),
        ("root@h: Permission denied (publickey).\n", "wrong_key"),
        (CHANGED, "changed"),
    ],
)
def test_behind_a_jump_host(stderr: str, kind: str) -> None:
    assert kind_of(stderr, jump=True) == kind


def test_every_kind_is_one_line_with_the_host_and_a_command() -> None:
    kinds = ("off", "moved", "blocked", "wrong_key", "changed", "unpinned", "jump")
    reasons = {kind: reason(kind, "gpu1", "root@h:1", "said", jump="gate") for kind in kinds}
    assert len({found.message for found in reasons.values()}) == len(kinds)
    for found in reasons.values():
        assert found.message.startswith("gpu1: ")
        assert "\n" not in found.line
        assert "`" in found.hint


def test_the_last_line_is_not_a_debugging_line() -> None:
    assert last_line("a\nb \ndebug1: c\n\n") == "b"
    assert last_line("debug1: c\n") == "ssh said nothing"
