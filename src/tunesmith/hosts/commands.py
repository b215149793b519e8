"""What `inv host.add`, `list`, `remove` and `trust` do."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tunesmith.core.callbacks import OnText
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import held
from tunesmith.hosts import inventory as inventories
from tunesmith.hosts import keys as own_keys
from tunesmith.hosts import sshconfig
from tunesmith.hosts.address import Address, parse_address, resolve
from tunesmith.hosts.inventory import Host
from tunesmith.hosts.login import KeyScan, Login, blobs, fingerprint, log_in, scan_key
from tunesmith.project import Project

_DROPPED = re.compile(r"[Cc]onnection (reset|closed)|closed the connection|MaxStartups")
_PATIENCE_SECONDS = 6.0
_Answer = TypeVar("_Answer", Login, KeyScan)


@dataclass(frozen=True)
class Added:
    """A host that let us in and is in the inventory now.

    `known` is true when it was there before (with the same host key); `installed` is the
    private key's file whose public half was put there; `notes` are lines worth reading.
    """

    host: Host
    fingerprint: str
    known: bool
    installed: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Trusted:
    """The host key pinned before (empty: none) and the one pinned now."""

    host: Host
    before: str
    now: str
    notes: tuple[str, ...]


def address_of(text: str, identity: Path | None) -> Address:
    """Return where a pasted line leads, ~/.ssh/config having had its say. No network.

    Raises UsageError when it leads nowhere, or `identity` is no usable key file.
    """
    parsed = parse_address(text)
    if identity is not None:
        parsed = replace(parsed, identity=identity)
    # ssh looks where the password file says; a $HOME of one's own is respected, too.
    own = sshconfig.user_config()
    elsewhere = own.parent != sshconfig.ssh_home() and own.is_file()
    address = resolve(parsed, own if elsewhere else None)
    if address.identity is not None:
        address = replace(address, identity=own_keys.check_identity(address.identity))
    return address


def add(
    project: Project,
    name: str,
    text: str,
    *,
    identity: Path | None = None,
    install_key: bool = False,
    expected: str | None = None,
    runner: str | None = None,
    ask: Callable[[str], str] | None = None,
    tell: OnText = lambda _: None,
) -> Added:
    """KeyScan a host, pin its key, log in, and write the inventory; nothing is written before.

    `expected` is a fingerprint the host key must have. With `install_key` a host that
    refuses our key gets it: `ask` is called with a question and returns the password. `tell`
    gets lines as things happen. A name that is known already gets the new address when the
    host key is the pinned one, and keeps its `runner` unless one is given. Raises UsageError,
    or TunesmithError that says why the host cannot be used.
    """
    inventories.check_name(name)
    if runner is not None:
        inventories.check_runner(runner)
    address = address_of(text, identity)
    inventory = project.inventory.absolute()
    known = inventories.read(inventory).get(name)
    with _alone(project, address):
        found = _probed(name, address)
    tell(f"{address.text}: host key {found.fingerprint}")
    _expect(name, found, expected)
    if known and blobs(known.keys).isdisjoint(blobs(found.keys)):
        raise TunesmithError(
            f"{name}: this is another machine than the {name} we know",
            [f"known:     {fingerprint(known.keys)}", f"this host: {found.fingerprint}"],
            hint=f"run `inv host.remove {name}` first if it replaces that one, or choose "
            "another name",
        )
    with _alone(project, address):
        login = _patiently(lambda: log_in(name, address, found.keys))
    installed = None
    notes: list[str] = []
    if login.kind == "wrong_key" and install_key and ask is not None:
        own = own_keys.own_key(address.identity)
        address = replace(address, identity=own.private)
        notes += [f"made a key for you: {own.private}"] if own.made else []
        login = _installed(name, address, found, own, ask)
        installed = own.private
    if login.kind != "ok":
        raise login.reason.error()
    host = _host(name, address, login, known.keys if known else found.keys)
    host = replace(host, runner=runner or (known.runner if known else host.runner))
    notes += _notes(host, address, inventories.read(inventory))
    _close(inventory, name)
    notes += _write(inventory, host, address, known.keys if known else ())
    return Added(host, found.fingerprint, known is not None, installed, tuple(notes))


def check_known(project: Project, name: str) -> None:
    """Raise UsageError for a name that is not in the inventory."""
    inventory = project.inventory.absolute()
    if name not in inventories.names(inventory):
        raise inventories.unknown(inventory, name)


def remove(project: Project, name: str) -> None:
    """Forget a host: inventory, pinned key, kept connection. The host itself is not touched."""
    inventory = project.inventory.absolute()
    check_known(project, name)
    # Whatever hosts.yml says of it: this is how one gets rid of a damaged entry.
    _close(inventory, name)
    if inventories.remove(inventory, name):
        with inventories.locked(inventory):
            # Unless another command has added one meanwhile.
            if not inventories.names(inventory):
                sshconfig.exclude(inventories.ssh_config(inventory), sshconfig.user_config())


def trust(
    project: Project,
    name: str,
    *,
    expected: str | None = None,
    tell: OnText = lambda _: None,
) -> Trusted:
    """Pin the key the host has now. A login that fails is a note: rebuilt hosts forget keys."""
    inventory = project.inventory.absolute()
    known = inventories.find(inventory, name)
    address = inventories.address_of(inventory, name)
    found = _probed(name, address)
    before = fingerprint(known.keys)
    tell(f"pinned: {before or 'none'}")
    tell(f"now:    {found.fingerprint}")
    _expect(name, found, expected)
    _close(inventory, name)
    login = log_in(name, address, found.keys)
    host = replace(known, keys=found.keys, python=login.python or known.python)
    notes = [] if login.kind == "ok" else [login.reason.line]
    notes += _write(inventory, host, address, known.keys)
    return Trusted(host, before, found.fingerprint, tuple(notes))


def listed(project: Project) -> tuple[Host, ...]:
    """Return the known hosts, by name. No network."""
    hosts = inventories.read(project.inventory.absolute())
    return tuple(hosts[name] for name in sorted(hosts))


@contextlib.contextmanager
def _alone(project: Project, address: Address) -> Iterator[None]:
    """Let one command of this clone connect to an address at a time: sshd drops some of those
    that come at once."""
    place = hashlib.sha256(f"{address.host}:{address.port}".encode()).hexdigest()[:16]
    with held(project.folder("locks") / place, lambda _: None):
        yield


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask again while the host drops the connection unheard, as a busy sshd does (MaxStartups)."""
    ends = time.monotonic() + _PATIENCE_SECONDS
    while True:
        answer = ask()
        dropped = answer.kind == "moved" and _DROPPED.search(answer.reason.message)
        if not dropped or time.monotonic() > ends:
            return answer
        # Not all of those that were dropped at the same moment again.
        time.sleep(random.uniform(0.3, 2.5))  # noqa: S311 - no secret


def _probed(name: str, address: Address) -> KeyScan:
    found = _patiently(lambda: scan_key(name, address))
    if found.kind != "ok":
        raise found.reason.error()
    return found


def _expect(name: str, found: KeyScan, expected: str | None) -> None:
    if expected and expected not in found.fingerprint.replace(",", "").split():
        raise TunesmithError(
            f"{name}: the host key is not the expected one; nothing was sent and nothing pinned",
            [f"expected:  {expected}", f"this host: {found.fingerprint}"],
        )


def _installed(
    name: str,
    address: Address,
    found: KeyScan,
    own: own_keys.OwnKey,
    ask: Callable[[str], str],
) -> Login:
    """Install the key and log in with it."""
    done = own_keys.install(name, address, found.keys, own, ask(f"password of {address.text}: "))
    if done.kind != "ok":
        raise done.reason.error()
    login = log_in(name, address, found.keys)
    if login.kind == "wrong_key":
        raise TunesmithError(
            f"{name}: {own.private}.pub is in the host's ~/.ssh/authorized_keys now, but sshd "
            "there does not accept it",
            hint="check that sshd reads this file and that only its owner can write to the "
            "home folder",
        )
    return login


def _host(name: str, address: Address, login: Login, keys: tuple[str, ...]) -> Host:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Host(name, address.text, now, login.python, address.jump, keys)


def _notes(host: Host, address: Address, others: dict[str, Host]) -> list[str]:
    notes = []
    if address.ignored:
        notes.append(f"not taken over from the line: {' '.join(address.ignored)}")
    if host.python is None and host.runner == inventories.RUNNERS[0]:
        notes.append(
            f"{host.name} has no Python >= 3.8, which `inv provision` needs: install python3 there"
        )
    same = [
        other.name
        for other in others.values()
        if other.name != host.name
        and other.address != host.address
        and not blobs(other.keys).isdisjoint(blobs(host.keys))
    ]
    if same:
        notes.append(
            f"{host.name} has the same host key as {', '.join(same)}: both come from an image "
            "with a key baked in, which anybody else who rents that image has, too"
        )
    return notes


def _write(inventory: Path, host: Host, address: Address, before: tuple[str, ...]) -> list[str]:
    """Write the inventory and the Include; return a note when the Include cannot be."""
    inventories.write(inventory, host, address, before)
    config, own = inventories.ssh_config(inventory), sshconfig.user_config()
    try:
        sshconfig.include(config, own)
    except OSError as error:
        return [
            f"{own} cannot be written ({error.strerror}); for plain `ssh {host.name}` put this "
            f'first in it: Include "{config}"'
        ]
    return []


def _close(inventory: Path, name: str) -> None:
    """End a kept connection; that there is none is no fault."""
    config = inventories.ssh_config(inventory)
    if not config.is_file() or name not in inventories.names(inventory):
        return
    argv = ["ssh", "-F", str(config), "-O", "exit", name]
    try:
        subprocess.run(argv, capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        raise TunesmithError(
            f"{name}: its kept connection does not end",
            hint=f"`ssh -F {config} -O exit {name}` shows why",
        ) from None
