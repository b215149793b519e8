"""What tasks.py calls for the hosts: run a verb and print its outcome."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from rich.table import Table

from tunesmith.cli.console import console, say
from tunesmith.core.errors import UsageError
from tunesmith.hosts import commands
from tunesmith.hosts import inventory as inventories
from tunesmith.hosts.probe import fingerprint
from tunesmith.plan.target import Resumable
from tunesmith.project import Project
from tunesmith.targets import factory
from tunesmith.targets.capability import require


def host_add(
    root: Path,
    name: str,
    address: str,
    *,
    identity: str = "",
    install_key: bool = False,
    expected: str = "",
    runner: str = "",
    dry: bool = False,
) -> None:
    """Add a host; the password for `install_key` comes from the terminal or from stdin."""
    project = Project.at(root)
    key = Path(identity) if identity else None
    factory.check_host_name(name)
    if dry:
        inventories.check_name(name)
        found = commands.address_of(address, key)
        say(f"would probe {found.text} and log in with {found.identity or 'your usual keys'}")
        say(f"would write {name} to {project.inventory}")
        return
    added = commands.add(
        project,
        name,
        address,
        identity=key,
        install_key=install_key,
        expected=expected or None,
        runner=runner or None,
        ask=_password,
        tell=say,
    )
    if added.installed:
        say(f"installed {added.installed}.pub on {name}")
    for note in added.notes:
        say(f"note: {note}")
    how = "known, address updated" if added.known else "added, host key pinned"
    say(f"{name}: {how}; Python for Ansible: {added.host.python or 'none'}")
    say(f"`ssh {name}` works now; `inv host.check --on {name}` looks at what it can do")


def host_list(root: Path) -> None:
    """Print the known hosts."""
    hosts = commands.listed(Project.at(root))
    if not hosts:
        say('no hosts yet; `inv host.add NAME "ssh ..."` adds one')
        return
    table = Table("host", "address", "added", "python", "host key", box=None, pad_edge=False)
    for host in hosts:
        table.add_row(
            host.name, host.address, host.added, host.python or "none", fingerprint(host.keys)
        )
    console.print(table)


def host_remove(root: Path, name: str, *, dry: bool = False) -> None:
    """Forget a host."""
    project = Project.at(root)
    if dry:
        commands.check_known(project, name)
        say(f"would forget {name} and its host key")
        return
    commands.remove(project, name)
    say(f"{name} is forgotten; the host itself was not touched")


def host_trust(root: Path, name: str, *, expected: str = "", dry: bool = False) -> None:
    """Pin the key a host has now."""
    project = Project.at(root)
    if dry:
        host = inventories.find(project.inventory.absolute(), name)
        say(f"would ask {host.address} for its key; pinned is {fingerprint(host.keys)}")
        return
    trusted = commands.trust(project, name, expected=expected or None, tell=say)
    for note in trusted.notes:
        say(f"note: {note}")
    same = trusted.before == trusted.now
    say(f"{name}: {'the pinned key is still its key' if same else 'the new key is pinned'}")


def host_autostart(root: Path, name: str, *, off: bool = False, dry: bool = False) -> None:
    """Let a host resume its runs by itself when it starts, or not any more."""
    target = require(factory.target_of(Project.at(root), name, say), Resumable)
    hook = target.start_hook()
    if dry and hook:
        say(f"would {'take the line out of' if off else 'write a line into'} {hook} of {name}")
        return
    target.autostart(wanted=not off)
    if off:
        say(f"{name}: after a restart `inv resume --on {name}` continues the runs")
    else:
        say(f"{name}: after a restart the host itself continues the runs (by {hook})")


def _password(question: str) -> str:
    """Return a password: typed unseen, or the first line of stdin when that is a pipe."""
    if sys.stdin.isatty():
        return getpass.getpass(question)
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise UsageError("no password on stdin; give it there as one line, or run in a terminal")
    return line
