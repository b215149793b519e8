"""What is at an address: nothing, something else, SSH; whose key it has; does it let us in.

Each answer that is not `ok` is one line that says what to do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import quoted
from tunesmith.hosts import ssh_errors
from tunesmith.hosts.address import Address
from tunesmith.hosts.answers import PYTHON, AnswerSource, Text
from tunesmith.hosts.probe.answer import Answer
from tunesmith.hosts.probe.script import ProbeSettings
from tunesmith.hosts.probe.script import script as probe_script
from tunesmith.hosts.probe.software import Pythons
from tunesmith.hosts.remote import FloodError, execute
from tunesmith.hosts.ssh_errors import Reason
from tunesmith.hosts.sshconfig import render

# Seconds a host has for accepting a connection, and again for SSH's first line.
PATIENCE = 10.0
# ssh's own time for a login: through a jump host, to a host with a slow start file.
_LOGIN_SECONDS = 60.0
# What Ansible's modules can run on (ansible-core 2.19).
_OLDEST_PYTHON = (3, 8)
# A known_hosts line, as ssh itself writes it.
_NONE = Reason("")
_KEY = Text(r"[^\s,|]{1,300} [a-z0-9@.-]{1,80} [A-Za-z0-9+/]{40,6000}={0,2}", 6400, "a host key")


@dataclass(frozen=True)
class KeyScan:
    """What answered at an address, before any login.

    `kind` is ok, or why not; `reason` tells people. `keys` are known_hosts lines of the host key,
    `fingerprint` is how ssh-keygen shows it.
    """

    kind: Literal["ok"] | ssh_errors.Kind
    reason: Reason = _NONE
    fingerprint: str = ""
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Login:
    """How a login went. `python` is the interpreter for Ansible, None when there is none."""

    kind: Literal["ok"] | ssh_errors.Kind
    reason: Reason = _NONE
    python: str | None = None


def scan_key(name: str, address: Address, *, patience: float = PATIENCE) -> KeyScan:
    """Look at an address: TCP, SSH's banner, the host key. Nobody logs in."""
    if not address.jump:
        reached = _reach(name, address, patience)
        if reached.kind != "ok":
            return reached
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        pinned = Path(folder) / "known_hosts"
        # ssh itself notes the key, over the way every later command takes; it offers no
        # way to log in, so the host ends it there. (ssh-keyscan knows no jump hosts.)
        options = (
            "StrictHostKeyChecking=accept-new",
            "PubkeyAuthentication=no",
            "PreferredAuthentications=none",
        )
        argv = _argv(Path(folder), name, address, pinned, (), options)
        try:
            done, _ = execute(argv, "exit 0", timeout=3 * patience)
        except subprocess.TimeoutExpired:
            return _not(name, address, "blocked", f"no host key within {3 * patience:g} s")
        except FloodError as flood:
            return _not(name, address, "unknown", f"it sends {flood}")
        text = pinned.read_text(encoding="utf-8") if pinned.exists() else ""
        keys = tuple(line for line in text.splitlines() if line.strip())
    if not keys:
        kind = ssh_errors.kind_of(done.stderr, jump=address.jump is not None)
        return _not(name, address, kind, ssh_errors.last_line(done.stderr))
    asked = AnswerSource(name, "its host key")
    keys = tuple(_KEY.read(asked, key) for key in keys)
    return KeyScan("ok", fingerprint=fingerprint(keys), keys=keys)


def log_in(
    name: str,
    address: Address,
    keys: Sequence[str],
    script: str | None = None,
    *,
    options: Sequence[str] = (),
    ssh_env: Mapping[str, str] | None = None,
) -> Login:
    """Log in to the host with exactly these host keys, once, and find a Python there.

    With a `script` that is run instead, and no Python is found. Raises TunesmithError when what
    the host calls its Python is no plain path.
    """
    text = script or probe_script([Pythons.SECTION], ProbeSettings())
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        pinned = Path(folder) / "known_hosts"
        pinned.write_text("".join(f"{line}\n" for line in keys), encoding="utf-8")
        argv = _argv(Path(folder), name, address, pinned, tuple(keys), options)
        try:
            done, began = execute(argv, text, timeout=_LOGIN_SECONDS, ssh_env=ssh_env)
        except subprocess.TimeoutExpired:
            said = f"no end of the login within {_LOGIN_SECONDS:g} s"
            return _login(name, address, "blocked", said)
        except FloodError as flood:
            return _login(name, address, "unknown", f"it sends {flood}")
    if began and done.returncode == 0:
        return Login("ok", python=None if script else _python(done.stdout, name))
    if began:
        said = ssh_errors.last_line(done.stderr)
        return _login(name, address, "unknown", f"exit code {done.returncode}: {said}")
    kind = ssh_errors.kind_of(done.stderr, jump=address.jump is not None)
    if kind == "wrong_key":
        return Login(kind, _refused(name, address, done.stderr))
    if done.returncode != 255:
        said = (
            "the login works, but runs no command; take the line of a direct connection (TCP) "
            "from the rental console"
        )
        return _login(name, address, "unknown", said)
    return _login(name, address, kind, ssh_errors.last_line(done.stderr))


def _python(told: str, name: str) -> str | None:
    """Return the first interpreter that Ansible can use, None where there is none."""
    found = Answer(told, name, (Pythons,)).of(Pythons).pythons
    fit = (p.path for p in found if p.version and _numbers(p.version) >= _OLDEST_PYTHON)
    python = next(fit, None)
    # Into the inventory, whose texts Ansible obeys.
    asked = AnswerSource(name, "its Python for Ansible")
    return PYTHON.read(asked, python) if python else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]{1,4}", version))


def fingerprint(keys: Sequence[str]) -> str:
    """Return known_hosts lines as ssh-keygen shows them: SHA256:... (ED25519).

    Raises TunesmithError for a line that is none.
    """
    shown = []
    for line in keys:
        try:
            _, kind, blob = line.split()[:3]
            key = base64.b64decode(blob, validate=True)
        except (ValueError, binascii.Error):
            raise TunesmithError(f"not a host key: {quoted(line)}") from None
        digest = base64.b64encode(hashlib.sha256(key).digest()).decode()
        short = kind.removeprefix("ssh-").partition("-")[0].upper()
        shown.append(f"SHA256:{digest.rstrip('=')} ({short})")
    return ", ".join(shown)


def blobs(keys: Sequence[str]) -> frozenset[str]:
    """Return the keys themselves, without the name they are noted under."""
    return frozenset(line.split()[2] for line in keys if len(line.split()) > 2)


def _reach(name: str, address: Address, patience: float) -> KeyScan:
    try:
        stream = socket.create_connection((address.host, address.port), timeout=patience)
    except socket.gaierror as error:
        kind: ssh_errors.Kind = "blocked" if error.errno == socket.EAI_AGAIN else "moved"
        return _not(name, address, kind, error.strerror or "name unknown")
    except TimeoutError:
        return _not(name, address, "blocked", f"no connection within {patience:g} s")
    except OSError as error:
        return _not(name, address, "off", error.strerror or str(error))
    with stream:
        return _banner(name, address, stream, patience)


def _banner(name: str, address: Address, stream: socket.socket, patience: float) -> KeyScan:
    """Wait for SSH's first line; a host may send a few others before it (RFC 4253, 4.2)."""
    ends = time.monotonic() + patience
    text = b""
    while len(text) < 1 << 14:
        if any(line.startswith(b"SSH-") for line in text.split(b"\n")):
            return KeyScan("ok")
        left = ends - time.monotonic()
        if left <= 0:
            break
        stream.settimeout(left)
        try:
            piece = stream.recv(1024)
        except TimeoutError:
            break
        except OSError as error:
            return _not(name, address, "moved", error.strerror or str(error))
        if not piece:
            said = "the port closed the connection without SSH's first line"
            return _not(name, address, "moved", said)
        text += piece
    if text:
        return _not(name, address, "moved", f"the port answers, but not with SSH: {text[:30]!r}")
    return _not(name, address, "blocked", f"connected, but no SSH within {patience:g} s")


def _argv(
    folder: Path,
    name: str,
    address: Address,
    pinned: Path,
    keys: tuple[str, ...],
    options: Sequence[str],
) -> list[str]:
    """Return an ssh command that goes the way of the inventory's, from a config of its own."""
    config = folder / "ssh_config"
    config.write_text(render(name, address, pinned, keys), encoding="utf-8")
    given = ("ControlMaster=no", "ControlPath=none", *options, "BatchMode=yes", "LogLevel=DEBUG1")
    words = [word for option in given for word in ("-o", option)]
    return ["ssh", "-F", str(config), "-T", *words, name, "--"]


def _refused(name: str, address: Address, stderr: str) -> Reason:
    """Name the keys that were tried, and the one that only lacks its passphrase."""
    # A banner of the host's may say so too: people are told to run what names a plain file.
    accepted = re.search(
        r"^debug1: Server accepts key: ([\w ./@+=,~-]+?) \S+ SHA256:", stderr, re.M
    )
    if accepted:
        return Reason(
            f"{name}: {address.text} accepts the key {accepted[1]}, which has a passphrase",
            f"unlock it for this session with `ssh-add {accepted[1]}`",
        )
    found = re.findall(r"Offering public key: (.+?) \S+ SHA256:\S+(.*)", stderr)
    tried = [f"{key} (agent)" if "agent" in how else key for key, how in found]
    said = f"tried: {', '.join(tried)}" if tried else "there is no key of yours to try"
    if "password" not in stderr.rpartition("Permission denied")[2]:
        said += "; it takes no password either"
    return ssh_errors.reason("wrong_key", name, address.text, said)


def _not(name: str, address: Address, kind: ssh_errors.Kind, said: str) -> KeyScan:
    return KeyScan(kind, ssh_errors.reason(kind, name, address.text, said, jump=address.jump))


def _login(name: str, address: Address, kind: ssh_errors.Kind, said: str) -> Login:
    return Login(kind, ssh_errors.reason(kind, name, address.text, said, jump=address.jump))
