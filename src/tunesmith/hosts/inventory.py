"""The hosts this clone knows: hosts.yml for Ansible, ssh_config, and pinned host keys.

All three are written here only: whole or not at all, readable by their owner only. A host
is known when it stands in hosts.yml, which is written last and emptied first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import replacing
from tunesmith.core.printable import quoted
from tunesmith.hosts import sshconfig
from tunesmith.hosts.address import Address, parse_jump
from tunesmith.hosts.answers import PYTHON, AnswerSource, OneOf, Shape, Text

# hosts.yml as Ansible reads it: groups, their hosts, and keys of the user's own.
Document = dict[str, Any]
# A host's variables there: ours and the user's.
Variables = dict[str, Any]

GROUP = "gpu_hosts"
_ABSENT = object()
# What jobs run in: an environment that `inv provision` installs, or a container of the image.
RUNNERS = ("conda", "container")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,30}")
# Words that mean something else to us or to Ansible. Those that `--on` takes for targets of
# their own are targets.factory's.
_RESERVED = ("all", "localhost", "ungrouped", GROUP)
_HEAD = """\
# Written by `inv host.add`, `inv host.trust` and `inv host.remove`. Keys and hosts of your
# own are kept, comments are not. How a host is reached stands in ssh_config.
"""
# What the file says of a host, as it was written.
_ADDRESS = Text(r"[\w.@+:\[\]%,/ -]*", 1000, "an address")
_ADDED = Text(r"[0-9T:+.Z-]*", 40, "a time")
# Of a host's variables, those that are ours: no template stands in them. Others are the user's.
_TEMPLATED = ("ansible_ssh_common_args", "host_address", "host_added", "runner")
_UNTEMPLATED = Text(r"(?s)(?!.*\{[{%#]).*", 8000, "a text without a template")


class Unsafe(str):
    """A text that Ansible takes as it is: `!unsafe` in YAML.

    Without the tag ansible-core templates every text of an inventory, and a template can run a
    command here.
    """


class _Loader(yaml.SafeLoader):
    """Knows `!unsafe`, which the user's own variables may have, too."""


class _Dumper(yaml.SafeDumper):
    """Writes `!unsafe`."""


def _unsafe_of(loader: _Loader, node: yaml.Node) -> Unsafe:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.YAMLError(f"!unsafe before what is no text {node.start_mark}")
    return Unsafe(loader.construct_scalar(node))


_Loader.add_constructor("!unsafe", _unsafe_of)
_Dumper.add_representer(Unsafe, lambda dumper, text: dumper.represent_scalar("!unsafe", str(text)))


def parse(text: str) -> Any:
    """Return what a hosts.yml says. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader


def unsafe(value: Any) -> Any:
    """Return plain values with every text, keys excepted, as one that Ansible takes as it is."""
    if isinstance(value, str):
        return Unsafe(value)
    if isinstance(value, Mapping):
        return {key: unsafe(item) for key, item in value.items()}
    return [unsafe(item) for item in value] if isinstance(value, list | tuple) else value


def variables(values: Mapping[str, object]) -> str:
    """Return variables as YAML for ansible-playbook, none of them a template."""
    return yaml.dump(unsafe(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Host:
    """A host of the inventory.

    `address` is for people. `python` runs Ansible's modules there; None when none was found.
    `keys` are the pinned host keys, `added` is UTC in ISO 8601. `runner` is what jobs run in:
    one of RUNNERS.
    """

    name: str
    address: str
    added: str
    python: str | None
    jump: str | None
    keys: tuple[str, ...]
    runner: str = RUNNERS[0]


def check_runner(runner: str) -> str:
    """Return what a host's jobs run in. Raises UsageError for what they cannot."""
    if runner not in RUNNERS:
        raise UsageError(f"--runner {runner}: it takes {' or '.join(RUNNERS)}")
    return runner


def check_name(name: str) -> str:
    """Return a host's name. Raises UsageError when it cannot be one."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a host's name: it takes up to 31 of a-z 0-9 - _ . and starts "
            "with a letter or digit, as in gpu1"
        )
    if name in _RESERVED:
        raise UsageError(
            f"{name!r} is a word of Ansible or of `--on`", hint="call the host gpu1, for example"
        )
    return name


def ssh_config(inventory: Path) -> Path:
    """Return the file for `ssh -F`."""
    return inventory / "ssh_config"


def pinned(inventory: Path, name: str) -> Path:
    """Return the known_hosts file of one host."""
    return inventory / "known_hosts" / name


def read(inventory: Path) -> dict[str, Host]:
    """Return the hosts by name. Raises UsageError when hosts.yml cannot be used, or says of a
    host what none can be."""
    known = _known(inventory)
    return {name: _host(inventory, name, *found) for name, found in known.items()}


def names(inventory: Path) -> tuple[str, ...]:
    """Return the names of the hosts, whatever hosts.yml says of them."""
    return tuple(_known(inventory))


def _known(inventory: Path) -> dict[str, tuple[Variables, str]]:
    """Return what hosts.yml and ssh_config have of each host that both know.

    One that only hosts.yml has is the user's own, which is reached in a way of his own.
    """
    blocks = sshconfig.blocks(_text(ssh_config(inventory)))
    hosts = _hosts_in(_load(inventory), inventory)
    return {name: (raw or {}, blocks[name]) for name, raw in hosts.items() if name in blocks}


def _host(inventory: Path, name: str, values: Variables, block: str) -> Host:
    """Return a host. What was once a host's answer is looked at as when it came."""

    def read(key: str, shape: Shape) -> Any:
        value = values.get(key)
        try:
            return None if value is None else shape.read(AnswerSource(name, key), value)
        except TunesmithError:
            raise _refused(inventory, name, key, value) from None

    if not _NAME.fullmatch(name):
        raise _refused(inventory, name, "its name", name)
    for key, value in values.items():
        if key in _TEMPLATED and isinstance(value, str) and not isinstance(value, Unsafe):
            read(key, _UNTEMPLATED)
    try:
        jump = sshconfig.address_in(block).jump
        if jump:
            parse_jump(jump)
    except (UsageError, ValueError):
        raise UsageError(
            f"{ssh_config(inventory)}: `{name}`: not what `inv host.add` writes",
            hint=f"`inv host.remove {name}`, then add the host again",
        ) from None
    return Host(
        name=name,
        address=read("host_address", _ADDRESS) or "",
        added=read("host_added", _ADDED) or "",
        python=read("ansible_python_interpreter", PYTHON),
        jump=jump,
        keys=tuple(_text(pinned(inventory, name)).splitlines()),
        runner=read("runner", OneOf(RUNNERS)) or RUNNERS[0],
    )


def _refused(inventory: Path, name: str, key: str, value: object) -> UsageError:
    return UsageError(
        f"{inventory / 'hosts.yml'}: `{name}`: {key}: {quoted(value)} is not what `inv host.add` "
        "writes, and nothing is done with it",
        hint=f"`inv host.remove {name}`, then add the host again",
    )


def find(inventory: Path, name: str) -> Host:
    """Return one host. Raises UsageError that lists the known ones, or as `read` does."""
    hosts = _known(inventory)
    if name not in hosts:
        raise unknown(inventory, name)
    return _host(inventory, name, *hosts[name])


def unknown(inventory: Path, name: str) -> UsageError:
    """Return the error for a name that is not in the inventory; it lists those that are."""
    known = ", ".join(names(inventory)) or "none yet"
    return UsageError(
        f"no host {name!r} in {inventory}; known are: {known}",
        hint='`inv host.add NAME "ssh ..."` adds one',
    )


def address_of(inventory: Path, name: str) -> Address:
    """Return how a known host is reached."""
    return sshconfig.address_in(sshconfig.blocks(_text(ssh_config(inventory)))[name])


def write(
    inventory: Path, host: Host, address: Address, before: tuple[str, ...] | None = None
) -> None:
    """Add a host or replace it; other hosts and unknown keys stay as they are.

    `before` are the keys pinned for it when the caller looked (none: it was not there). Raises
    UsageError when another command has added, changed or removed it since.
    """
    with locked(inventory):
        there = read(inventory).get(host.name)
        if before is not None and (there.keys if there else ()) != before:
            done = "written" if there else "removed"
            raise UsageError(
                f"{host.name}: another command has {done} it meanwhile",
                hint="`inv host.list` shows the hosts",
            )
        known_hosts = pinned(inventory, host.name)
        known_hosts.parent.mkdir(mode=0o700, exist_ok=True)
        _write(known_hosts, "".join(f"{line}\n" for line in host.keys))
        sshconfig.ssh_home().mkdir(mode=0o700, exist_ok=True)  # kept connections are there
        config = ssh_config(inventory)
        blocks = sshconfig.blocks(_text(config))
        blocks[host.name] = sshconfig.render(host.name, address, known_hosts, host.keys)
        _write(config, sshconfig.join(blocks))
        everything = _load(inventory)
        hosts = _hosts_in(everything, inventory)
        values = dict(hosts.get(host.name) or {})
        values |= {
            "ansible_ssh_common_args": Unsafe(f"-F {shlex.quote(str(config))} -o BatchMode=yes"),
            "host_address": Unsafe(host.address),
            "host_added": Unsafe(host.added),
        }
        values.pop("runner", None)
        if host.runner != RUNNERS[0]:
            values["runner"] = host.runner
        values.pop("ansible_python_interpreter", None)
        if host.python:
            values["ansible_python_interpreter"] = Unsafe(host.python)
        hosts[host.name] = values
        _dump(inventory, everything)


def remove(inventory: Path, name: str) -> bool:
    """Forget a host and its keys; True when it was the last one.

    Raises UsageError when another command has removed it.
    """
    with locked(inventory):
        everything = _load(inventory)
        if _hosts_in(everything, inventory).pop(name, _ABSENT) is _ABSENT:
            raise UsageError(
                f"{name}: another command has removed it", hint="`inv host.list` shows the hosts"
            )
        _dump(inventory, everything)
        config = ssh_config(inventory)
        blocks = sshconfig.blocks(_text(config))
        blocks.pop(name, None)
        _write(config, sshconfig.join(blocks))
        pinned(inventory, name).unlink(missing_ok=True)
        return not any(blocks)


@contextlib.contextmanager
def locked(inventory: Path) -> Iterator[None]:
    """One writer at a time of the inventory. Not to be taken twice."""
    inventory.mkdir(parents=True, exist_ok=True)
    inventory.chmod(0o700)
    lock = os.open(inventory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _load(inventory: Path) -> Document:
    path = inventory / "hosts.yml"
    try:
        raw = parse(_text(path))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected groups, found {type(raw).__name__}")
    return raw


def _hosts_in(everything: Document, inventory: Path) -> dict[str, Variables | None]:
    """Return the mapping of our hosts inside `everything`, made when it is not there."""
    place = everything
    for key in (GROUP, "hosts"):
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            raise UsageError(
                f"{inventory / 'hosts.yml'}: `{key}`: expected keys, found {type(place).__name__}"
            )
    for name, values in place.items():
        if not isinstance(values, dict | None):
            raise UsageError(
                f"{inventory / 'hosts.yml'}: `{name}`: expected keys, found {type(values).__name__}"
            )
    return place


def _dump(inventory: Path, everything: Document) -> None:
    text = yaml.dump(everything, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    _write(inventory / "hosts.yml", _HEAD + text)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.chmod(0o600)
        part.write_text(text, encoding="utf-8")
