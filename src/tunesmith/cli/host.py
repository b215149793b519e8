"""The verbs on hosts."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import HOST, HOSTS, MIRROR, WITH

_FINGERPRINT = "host key the console shows (SHA256:...); any other is refused"


@command(
    example="inv provision --on gpu1 --mirror cn",
    help={
        "on": HOSTS,
        "mirror": MIRROR,
        "flavour": "cu128 or cu126 (default: the one that GPU and driver need)",
        "with": WITH,
        "toolkit": "also install nvcc of the flavour's CUDA",
        "token": "read a Hugging Face token from stdin",
        "check": "change nothing; report what would change",
        "diff": "show the changed lines of files",
        "full": "run the playbook even if the host is in state",
    },
)
def provision(
    session: Session,
    on: str,
    mirror: str = "default",
    flavour: str = "",
    with_: str = "",
    toolkit: bool = False,
    token: bool = False,
    check: bool = False,
    diff: bool = False,
    full: bool = False,
) -> None:
    """Provision SSH hosts as training machines."""
    from tunesmith.cli import provisioning

    provisioning.provision(
        session.root,
        on,
        mirror=mirror,
        flavour=flavour or None,
        extras=with_,
        toolkit=toolkit,
        token=token,
        check=check,
        diff=diff,
        full=full,
        dry=session.dry,
    )


@command(
    "host.add",
    example='inv host.add gpu1 "ssh -p 42151 root@connect.example.com"',
    choices={"runner": ("conda", "container")},
    help={
        "name": "what to call it",
        "address": "the line the rental console shows, in quotes, or an alias of ~/.ssh/config",
        "identity": "private key to log in with",
        "install-key": "log in with a password once and install your public key",
        "fingerprint": _FINGERPRINT,
        "runner": "conda (default), or container for a host with Docker",
    },
)
def add(
    session: Session,
    name: str,
    address: str,
    identity: str = "",
    install_key: bool = False,
    fingerprint: str = "",
    runner: str = "",
) -> None:
    """Add a host: probe it, pin its key, log in."""
    from tunesmith.cli.console import say
    from tunesmith.hosts import commands, inventory
    from tunesmith.targets import factory

    project = session.project
    key = Path(identity) if identity else None
    factory.check_host_name(name)
    if session.dry:
        inventory.check_name(name)
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
        expected=fingerprint or None,
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


def _password(question: str) -> str:
    """Return a password: typed unseen, or the first line of stdin when that is a pipe."""
    if sys.stdin.isatty():
        return getpass.getpass(question)
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        from tunesmith.core.errors import UsageError

        raise UsageError(
            "no password on stdin", hint="give it there as one line, or run in a terminal"
        )
    return line


@command("host.list", example="inv host.list")
def list_(session: Session) -> None:
    """List the known hosts."""
    from rich.table import Table

    from tunesmith.cli.console import console, say
    from tunesmith.hosts import commands
    from tunesmith.hosts.login import fingerprint

    hosts = commands.listed(session.project)
    if not hosts:
        say('no hosts yet; `inv host.add NAME "ssh ..."` adds one')
        return
    table = Table("host", "address", "added", "python", "host key", box=None, pad_edge=False)
    for host in hosts:
        keys = fingerprint(host.keys)
        table.add_row(host.name, host.address, host.added, host.python or "none", keys)
    console.print(table)


@command("host.remove", example="inv host.remove gpu1", help={"name": HOST})
def remove(session: Session, name: str) -> None:
    """Forget a host; the host itself is not touched."""
    from tunesmith.cli.console import say
    from tunesmith.hosts import commands

    if session.dry:
        commands.check_known(session.project, name)
        say(f"would forget {name} and its host key")
        return
    commands.remove(session.project, name)
    say(f"{name} is forgotten; the host itself was not touched")


@command(
    "host.trust", example="inv host.trust gpu1", help={"name": HOST, "fingerprint": _FINGERPRINT}
)
def trust(session: Session, name: str, fingerprint: str = "") -> None:
    """Pin the new key of a rebuilt host."""
    from tunesmith.cli.console import say
    from tunesmith.hosts import commands, inventory
    from tunesmith.hosts.login import fingerprint as shown

    project = session.project
    if session.dry:
        host = inventory.find(project.inventory.absolute(), name)
        say(f"would ask {host.address} for its key; pinned is {shown(host.keys)}")
        return
    trusted = commands.trust(project, name, expected=fingerprint or None, tell=say)
    for note in trusted.notes:
        say(f"note: {note}")
    same = trusted.before == trusted.now
    say(f"{name}: {'the pinned key is still its key' if same else 'the new key is pinned'}")


@command(
    "host.autostart",
    example="inv host.autostart --on gpu1",
    help={"on": HOST, "off": "disable autostart"},
)
def autostart(session: Session, on: str, off: bool = False) -> None:
    """Let a host resume its runs when it starts."""
    from tunesmith.cli.console import say
    from tunesmith.plan.target import Resumable
    from tunesmith.targets import factory
    from tunesmith.targets.capability import require

    target = require(factory.target_of(session.project, on, say), Resumable)
    hook = target.start_hook()
    if session.dry and hook:
        say(f"would {'take the line out of' if off else 'write a line into'} {hook} of {on}")
        return
    target.autostart(wanted=not off)
    if off:
        say(f"{on}: after a restart `inv resume --on {on}` continues the runs")
    else:
        say(f"{on}: after a restart the host itself continues the runs (by {hook})")


@command(
    "host.check",
    example="inv host.check --on gpu1",
    help={
        "on": HOST,
        "mirror": MIRROR,
        "flavour": "cu128 or cu126 (default: the one that GPU and driver need)",
        "config": "a training's YAML: whether it fits into the GPU's memory",
        "json": "one JSON object on stdout",
    },
)
def check(
    session: Session,
    on: str,
    mirror: str = "default",
    flavour: str = "",
    config: str = "",
    json: bool = False,
) -> None:
    """Check a host before you pay for hours of it."""
    from tunesmith.cli.host_check import host_check

    host_check(
        session.root, on, mirror=mirror, flavour=flavour or None, config=config, as_json=json
    )


@command("host.verify", example="inv host.verify --on gpu1", help={"on": HOSTS})
def verify(session: Session, on: str) -> None:
    """Test that a host is as provisioning leaves it."""
    from tunesmith.cli import provisioning

    provisioning.host_verify(session.root, on)


@command("host.reset", example="inv --dry host.reset --on gpu1", help={"on": HOSTS})
def reset(session: Session, on: str) -> None:
    """Remove what provisioning installed; data and runs stay."""
    from tunesmith.cli import provisioning

    provisioning.host_reset(session.root, on, dry=session.dry)
