"""What ssh says when it fails, and what a person should do then. Pure.

Texts of OpenSSH 8.2 to 10 (they are not translated: no message catalogue exists).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import one_line

Kind = Literal[
    "off", "moved", "blocked", "wrong_key", "changed", "unpinned", "jump", "lost", "unknown"
]

# Alias under which a host's key is pinned: its address may change, its key may not.
ALIAS_PREFIX = "tunesmith-"

_KINDS: tuple[tuple[str, Kind], ...] = (
    (rf"host key for {ALIAS_PREFIX}\S+ has changed", "changed"),
    (rf"no \S+ host key is known for {ALIAS_PREFIX}", "unpinned"),
    (r"too many authentication failures", "wrong_key"),
    (r"temporary failure in name resolution", "blocked"),
    (r"could not resolve hostname|name or service not known", "moved"),
    (r"administratively prohibited", "blocked"),
    (r"timed out during banner exchange|connect.* timed out", "blocked"),
    (r"connection refused|no route to host|network is unreachable", "off"),
    (r"permission denied \(", "wrong_key"),
    (r"kex_exchange_identification|banner line contains invalid", "moved"),
    (
        r"connection (reset|closed|to \S+ closed)|broken pipe|send disconnect|not responding"
        r"|read from master failed",
        "lost",
    ),
)
# The jump host's ssh prints beside ours, which then finds its pipe closed ("UNKNOWN port").
_BEHIND_JUMP = re.compile(r"open failed|stdio forwarding failed", re.IGNORECASE)
_PIPE_CLOSED = re.compile(r"unknown port|kex_exchange_identification", re.IGNORECASE)
# What our own ssh says of its pipe, and of itself with -v. Where the jump host is at fault its
# ssh says something, too; alone, these mean that what it led to does not speak SSH.
_OWN_WORDS = re.compile(r"^(kex_exchange_identification: |.* UNKNOWN port |debug\d: |OpenSSH_)")


def kind_of(stderr: str, *, jump: bool = False) -> Kind:
    """Return why ssh failed, from its stderr. `jump`: the host lies behind a jump host."""
    if jump and _PIPE_CLOSED.search(stderr) and not _BEHIND_JUMP.search(stderr):
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        return "moved" if all(map(_OWN_WORDS.match, lines)) else "jump"
    text = stderr.lower()
    return next((kind for pattern, kind in _KINDS if re.search(pattern, text)), "unknown")


def last_line(stderr: str) -> str:
    """Return what ssh said last, without its debugging lines: printable, and not too long.

    A banner of the host's is among it.
    """
    lines = [one_line(line) for line in stderr.splitlines() if not line.startswith("debug")]
    return next((line for line in reversed(lines) if line), "ssh said nothing")


@dataclass(frozen=True)
class Reason:
    """Why ssh failed, for people, and what to do then."""

    message: str
    hint: str = ""

    @property
    def line(self) -> str:
        """Both as one line."""
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def error(self, detail: Sequence[str] = ()) -> TunesmithError:
        """Return the error to raise."""
        return TunesmithError(self.message, detail, hint=self.hint)


def reason(kind: Kind, name: str, where: str, said: str, *, jump: str | None = None) -> Reason:
    """Return the reason for people. `where` is the address, `said` ssh's own words."""
    add = f'`inv host.add {name} "ssh ..."`'
    message, hint = {
        "off": (
            f"{where} is off ({said})",
            "start it in the rental console and copy its SSH line again, since the port may have "
            f"changed: {add}",
        ),
        "moved": (
            f"no SSH server at {where} ({said}): the instance has moved or is still starting",
            f"copy its SSH line from the rental console again: {add}",
        ),
        "blocked": (
            f"{where} does not answer ({said}): a firewall, proxy or VPN drops the connection, or "
            "the port is not the console's",
            f"compare the address with the console and correct it: {add}",
        ),
        "wrong_key": (
            f"{where} refuses your key ({said})",
            "add your public key in the rental console, or install it with the password: "
            f'`inv host.add {name} "ssh ..." --install-key`',
        ),
        "changed": (
            f"the host key of {where} is not the pinned one; no command was sent",
            f"if the instance was rebuilt, compare both keys and pin the new one: "
            f"`inv host.trust {name}`",
        ),
        "unpinned": (
            f"no host key is pinned for {where}; no command was sent",
            f"look at its key and pin it: `inv host.trust {name}`",
        ),
        "jump": (
            f"the jump host {jump} does not let us through ({said})",
            f"make `ssh {jump}` work without a question first",
        ),
        "lost": (
            f"the connection to {where} was lost ({said})",
            "if the host is still running, run the same command again",
        ),
        "unknown": (f"ssh to {where} failed: {said}", ""),
    }[kind]
    return Reason(f"{name}: {message}", hint)
