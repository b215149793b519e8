"""The line a rental console shows, as values. What could run a command is refused."""

from __future__ import annotations

import ipaddress
import re
import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from tunesmith.core.errors import UsageError

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_ZONE = re.compile(r"[A-Za-z0-9]+")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
# Flags of ssh without a value, and options with one, that do not say where a host is.
_FLAGS_DROPPED = "46aACfgkKMnNqsTtvVxXyY"
_OPTIONS_DROPPED = "LRDbcmB"
_KEYWORDS_DROPPED = {
    "addressfamily",
    "connecttimeout",
    "exitonforwardfailure",
    "forwardagent",
    "identitiesonly",
    "localforward",
    "loglevel",
    "passwordauthentication",
    "preferredauthentications",
    "pubkeyauthentication",
    "serveralivecountmax",
    "serveraliveinterval",
    "stricthostkeychecking",
    "tcpkeepalive",
    "userknownhostsfile",
}
# What -o may say, as the option that says the same.
_KEYWORDS = {"port": "p", "user": "l", "identityfile": "i", "proxyjump": "J", "hostname": "h"}


@dataclass(frozen=True)
class Hop:
    """One jump host of a ProxyJump."""

    host: str
    port: int = 22
    user: str | None = None

    @property
    def text(self) -> str:
        """The hop as ProxyJump takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True)
class Address:
    """Where a host is and how one gets in.

    `user` None is what ssh takes: the name one has here. `identity` is a private key's
    file, `jump` a ProxyJump, `ignored` what the pasted line said and we do not take over.
    """

    host: str
    port: int = 22
    user: str | None = None
    identity: Path | None = None
    jump: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The address for people: user@host:port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        via = f" through {self.jump}" if self.jump else ""
        return f"{user}{host}:{self.port}{via}"


def parse_address(text: str) -> Address:
    """Return the address in a line such as `ssh -p 42151 root@host` or `root@host:42151`.

    Pure; `resolve` then asks ~/.ssh/config. Raises UsageError for anything else, for a
    password, and for options that would run a command.
    """
    # A console may wrap the line, with or without a backslash.
    unwrapped = re.sub(r"\\?\r?\n", " ", text.strip())
    try:
        words = shlex.split(unwrapped)
    except ValueError as error:
        raise UsageError(f"{_shown(text)}: {error}", hint="paste the whole SSH line") from None
    if not words:
        raise UsageError(
            "the address is empty", hint='paste the SSH line, as in "ssh -p 42151 root@host"'
        )
    if words[0] == "sshpass":
        raise UsageError(
            "a password does not belong on a command line",
            hint="paste the line from `ssh` on; "
            '`inv host.add NAME "ssh ..." --install-key` asks for the password once',
        )
    if words[0] == "ssh":
        return _parse_ssh(words[1:], text)
    if len(words) > 1:
        raise UsageError(
            f"{_shown(text)}: more than one address", hint="put the SSH line in quotes"
        )
    return _parse_place(words[0], text)


def parse_jump(text: str) -> tuple[Hop, ...]:
    """Return the hops of a ProxyJump, first one first. Raises UsageError."""
    hops = []
    for part in text.split(","):
        place = _parse_place(part, text)
        hops.append(Hop(place.host, place.port, place.user))
    return tuple(hops)


def resolve(address: Address, config: Path | None = None) -> Address:
    """Return the address after ~/.ssh/config (or `config`) had its say: alias, user, key, jump.

    Raises UsageError when the config reaches the host by a ProxyCommand.
    """
    words = ["-F", str(config)] if config else []
    words += ["-p", str(address.port)] if address.port != Address.port else []
    words += ["-l", address.user] if address.user else []
    said = _settings([*words, address.host])
    # What ssh says about any host, so that its defaults are not taken for the user's will.
    plain = _settings(["-F", "none", address.host])
    command = said.get("proxycommand", ["none"])[0]
    if command != "none" and not address.jump:
        raise UsageError(
            f"{address.host}: ~/.ssh/config reaches it by ProxyCommand {command!r}",
            hint="use ProxyJump there, or give the whole address with -J",
        )
    jump = said.get("proxyjump", ["none"])[0]
    identities = said.get("identityfile", [])
    own_key = identities != plain.get("identityfile", [])
    resolved = replace(
        address,
        host=said.get("hostname", [address.host])[0],
        port=int(said.get("port", [str(address.port)])[0]),
        user=address.user or said.get("user", [None])[0],
        identity=address.identity or _first_key(identities, own_key, address.host),
        jump=address.jump or (jump if jump != "none" else None),
    )
    # The config's values go where ours go: they are held to the same rules.
    _check_host(resolved.host, address.host)
    if resolved.user:
        _check_user(resolved.user, address.host)
    if resolved.jump:
        parse_jump(resolved.jump)
    return resolved


def _settings(words: list[str]) -> dict[str, list[str]]:
    """Return what `ssh -G` prints: every setting in force, by its name in small letters."""
    done = subprocess.run(["ssh", "-G", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UsageError(f"ssh cannot read its config: {said}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, []).append(value)
    return found


def _first_key(identities: list[str], own_key: bool, host: str) -> Path | None:
    if not own_key or not identities or identities[0] == "none":
        return None
    if "%" in identities[0] or "${" in identities[0]:
        raise UsageError(
            f"{host}: ~/.ssh/config names its key {identities[0]!r}",
            hint="give the key's file with --identity",
        )
    return Path(identities[0]).expanduser()


def _parse_ssh(words: list[str], text: str) -> Address:
    """Read the words after `ssh`. Options may stand before and behind the host."""
    place: Address | None = None
    said: dict[str, str] = {}
    ignored: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if place is not None:
                raise UsageError(f"{_shown(text)}: {word!r} is more than an address")
            place = _parse_place(word, text, colon=False)
            continue
        # -CNg, -p42151, -p 42151
        letters = word[1:]
        while letters and letters[0] in _FLAGS_DROPPED:
            ignored.append(f"-{letters[0]}")
            letters = letters[1:]
        if not letters:
            if word in ("-", "--"):
                raise UsageError(f"{_shown(text)}: {word!r} is not part of an address")
            continue
        option, value = letters[0], letters[1:]
        if not value:
            if not rest:
                raise UsageError(f"{_shown(text)}: -{option} lacks its value")
            value = rest.pop(0)
        _take(option, value, said, ignored, text)
    if place is None:
        raise UsageError(f"{_shown(text)}: no host in it")
    return _filled(place, said, tuple(ignored), text)


def _take(option: str, value: str, said: dict[str, str], ignored: list[str], text: str) -> None:
    if option in "plJi":
        said.setdefault(option, value)
    elif option in _OPTIONS_DROPPED:
        ignored.append(f"-{option} {value}")
    elif option == "o":
        keyword, _, setting = re.sub(r"\s*=\s*|\s+", "=", value.strip(), count=1).partition("=")
        if keyword.lower() in _KEYWORDS:
            said.setdefault(_KEYWORDS[keyword.lower()], setting.strip('"'))
        elif keyword.lower() in _KEYWORDS_DROPPED:
            ignored.append(f"-o {value}")
        else:
            raise UsageError(f"{_shown(text)}: -o {keyword} is not taken from a pasted line")
    else:
        raise UsageError(f"{_shown(text)}: -{option} is not taken from a pasted line")


def _filled(place: Address, said: dict[str, str], ignored: tuple[str, ...], text: str) -> Address:
    """Return the place with what the options said; as for ssh, an option wins over user@."""
    jump = said.get("J")
    if jump == "none":
        jump = None
    if jump:
        parse_jump(jump)
    return replace(
        place,
        host=_check_host(said["h"], text) if "h" in said else place.host,
        port=_port(said["p"], text) if "p" in said else place.port,
        user=_check_user(said["l"], text) if "l" in said else place.user,
        identity=_identity(said["i"], text) if "i" in said else None,
        jump=jump,
        ignored=ignored,
    )


def _parse_place(word: str, text: str, *, colon: bool = True) -> Address:
    """Read [ssh://][user@]host[:port]; `colon` False: a port stands only in a URL."""
    rest = word
    if word.startswith("ssh://"):
        parts = urlsplit(word)
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise UsageError(f"{_shown(text)}: more than an address in the URL")
        rest, colon = parts.netloc, True
    elif "://" in word:
        raise UsageError(f"{_shown(text)}: not an SSH address")
    user, at, place = rest.rpartition("@")
    if ":" in user:
        # Not repeated: the message must not spread the secret.
        raise UsageError("a password does not belong in an address", hint="leave it out")
    host, port = _split_port(place, text) if colon else (place, "")
    return Address(
        host=_check_host(host.strip("[]") if host.startswith("[") else host, text),
        port=_port(port, text) if port else Address.port,
        user=_check_user(user, text) if at else None,
    )


def _split_port(place: str, text: str) -> tuple[str, str]:
    if place.startswith("["):
        host, closed, after = place[1:].partition("]")
        if not closed or (after and not after.startswith(":")) or after == ":":
            raise UsageError(f"{_shown(text)}: expected [address]:port")
        return host, after[1:]
    if place.count(":") > 1:
        return place, ""  # an IPv6 address without a port
    host, colon, port = place.partition(":")
    if colon and not port:
        raise UsageError(f"{_shown(text)}: no port after the colon")
    return host, port


def _check_host(host: str, text: str) -> str:
    if ":" in host:
        address, percent, zone = host.partition("%")
        try:
            ipaddress.IPv6Address(address)
        except ValueError:
            raise UsageError(f"{_shown(text)}: {host!r} is no host (a port: `-p N`)") from None
        if percent and not _ZONE.fullmatch(zone):
            raise UsageError(f"{_shown(text)}: {host!r} is no host")
    elif (
        not _HOST.fullmatch(host)
        or len(host) > 253
        or not all(0 < len(label) <= 63 for label in host.split("."))
    ):
        raise UsageError(f"{_shown(text)}: {host!r} is no host name or IP address")
    return host


def _check_user(user: str, text: str) -> str:
    if not _USER.fullmatch(user):
        raise UsageError(f"{_shown(text)}: {user!r} is no user name")
    return user


def _port(port: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise UsageError(f"{_shown(text)}: {port!r} is no port (1 to 65535)")
    return int(port)


def _identity(path: str, text: str) -> Path:
    if not path or path.startswith("-") or any(ord(letter) < 32 for letter in path):
        raise UsageError(f"{_shown(text)}: {path!r} is no key file")
    return Path(path).expanduser().absolute()


def _shown(text: str) -> str:
    """Return the pasted text for a message: one line, not too long."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else f"{line[:77]}...")
