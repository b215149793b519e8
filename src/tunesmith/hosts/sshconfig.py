"""The ssh_config of the inventory: the one place that says how a host is reached.

One block a host. Ansible, testinfra, rsync and we ourselves read it with `ssh -F`; plain
`ssh NAME` and VS Code find it through an Include in ~/.ssh/config.
"""

from __future__ import annotations

import glob
import hashlib
import os
import pwd
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.files import locked, replacing
from tunesmith.hosts.address import Address, parse_jump
from tunesmith.hosts.ssh_errors import ALIAS_PREFIX

HEAD = """\
# Written by `inv host.add` and `inv host.remove`: one block a host.
"""
_OPENS = re.compile(r"Host\s+(.+)|Match\s.+")
# A kept connection is a socket; its path and ssh's temporary suffix must fit into 107 bytes.
_LONGEST_SOCKET = 107 - 17


def render(name: str, address: Address, pinned: Path, keys: tuple[str, ...]) -> str:
    """Return a host's block. `pinned` is its known_hosts file, which holds `keys`.

    Raises UsageError when a path cannot be written in an ssh_config.
    """
    lines = [f"Host {name}", f"  HostName {address.host}", f"  Port {address.port}"]
    lines += [f"  User {address.user}"] if address.user else []
    if address.identity:
        lines += [f"  IdentityFile {quoted(address.identity)}", "  IdentitiesOnly yes"]
    if address.jump:
        lines += [f"  # ProxyJump {address.jump}", f"  ProxyCommand {_through(address.jump)}"]
    lines += [
        f"  HostKeyAlias {ALIAS_PREFIX}{name}",
        f"  UserKnownHostsFile {quoted(pinned)}",
        "  GlobalKnownHostsFile /dev/null",
        "  StrictHostKeyChecking yes",
        "  UpdateHostKeys no",
        "  CheckHostIP no",
        "  ForwardAgent no",
        *(f"  {line}" for line in _kept_connection(name, address, pinned, keys)),
        "  ServerAliveInterval 5",
        "  ServerAliveCountMax 3",
        "  ConnectTimeout 15",
    ]
    return "\n".join(lines) + "\n"


def quoted(path: Path) -> str:
    """Return a path as ssh_config takes it: in quotes, % doubled."""
    text = str(path)
    if re.search(r'["\\\n\r]|\$\{', text):
        raise UsageError(f"{text!r} cannot stand in an ssh_config; move it to a plainer path")
    return '"' + text.replace("%", "%%") + '"'


def blocks(text: str) -> dict[str, str]:
    """Return the blocks of an ssh_config by name, as they stand there.

    What stands before the first block has the name "", a Match its whole line.
    """
    found = {"": ""}
    name = ""
    for line in text.splitlines(keepends=True):
        if opens := _OPENS.match(line):
            name = (opens[1] or opens[0]).strip()
        found[name] = found.get(name, "") + line
    return found


def address_in(block: str) -> Address:
    """Return the address a block leads to."""
    values: dict[str, str] = {}
    for line in block.splitlines():
        key, _, value = line.strip().removeprefix("# ").partition(" ")
        values.setdefault(key.lower(), value.strip())
    identity = values.get("identityfile")
    return Address(
        host=values.get("hostname", ""),
        port=int(values.get("port", "22")),
        user=values.get("user"),
        identity=Path(shlex.split(identity)[0].replace("%%", "%")) if identity else None,
        jump=values.get("proxyjump"),
    )


def join(all_blocks: Mapping[str, str]) -> str:
    """Return the ssh_config of these blocks."""
    head = all_blocks.get("", "").strip() or HEAD.strip()
    rest = [block.strip() for name, block in all_blocks.items() if name]
    return "\n\n".join([head, *rest]) + "\n"


def include(config: Path, own: Path) -> bool:
    """Make `own` (~/.ssh/config) include `config` before all else; True when it was written.

    What stands there is kept as it is; a file or folder that others may write to, which
    ssh refuses, is closed to them.
    """
    line = _include_line(config)
    own.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A link (people keep such files in a repository) stays a link.
    own = own.resolve()
    with locked(own):
        text = own.read_text(encoding="utf-8") if own.exists() else ""
        if text.partition("\n")[0] == line:
            return False
        _rewrite(own, f"{line}\n{_without(text, line)}")
    return True


def exclude(config: Path, own: Path) -> bool:
    """Take the line of `include` out again; True when it was there."""
    own = own.resolve()
    line = _include_line(config)
    if not own.exists():
        return False
    with locked(own):
        text = own.read_text(encoding="utf-8") if own.exists() else ""
        if line not in text.splitlines():
            return False
        _rewrite(own, _without(text, line))
    return True


def ssh_home() -> Path:
    """Return the ~/.ssh of ssh itself, which asks the password file and not $HOME."""
    return Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"


def user_config() -> Path:
    """Return ~/.ssh/config."""
    return Path.home() / ".ssh" / "config"


def _include_line(config: Path) -> str:
    return f"Include {quoted(Path(glob.escape(str(config))))}".replace("%%", "%")


def _without(text: str, line: str) -> str:
    return "".join(kept for kept in text.splitlines(keepends=True) if kept.rstrip("\r\n") != line)


def _rewrite(own: Path, text: str) -> None:
    mode = own.stat().st_mode & 0o7755 if own.exists() else 0o600
    with replacing(own) as part:
        part.write_text(text, encoding="utf-8")
        part.chmod(mode)


def _through(jump: str) -> str:
    """Return the command that ProxyJump would start, but with the user's own ssh_config.

    With `ssh -F`, ProxyJump looks the jump host up in the file of -F only (and breaks on a
    blank in its path): neither a Host block nor known_hosts of the user would count.
    """
    *before, last = parse_jump(jump)
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes"]
    words += ["-J", ",".join(hop.text for hop in before)] if before else []
    words += ["-p", str(last.port)] if last.port != Address.port else []
    words += ["-l", last.user] if last.user else []
    return " ".join([*words, "-W", "[%h]:%p", last.host])


def _kept_connection(
    name: str, address: Address, pinned: Path, keys: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the lines that keep a connection open for the next command.

    Its socket is named after everything that makes it the right one: a host that moved or
    has another key never gets a connection of before.
    """
    material = "\n".join([name, repr(address), str(pinned), *keys])
    digest = hashlib.sha256(material.encode()).hexdigest()[:16]
    if len(os.fsencode(ssh_home() / f"ts-{digest}")) > _LONGEST_SOCKET:
        return ("ControlMaster no",)
    return ("ControlMaster auto", f"ControlPath ~/.ssh/ts-{digest}", "ControlPersist 10m")
