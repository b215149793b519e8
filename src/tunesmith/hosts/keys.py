"""The user's own key: chosen or made, and put on a host with a password typed once."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import locked
from tunesmith.hosts.address import Address
from tunesmith.hosts.login import Login, log_in
from tunesmith.hosts.ssh_errors import Reason

# In ssh's own order of liking.
_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")
# ssh starts this for the password. It answers once: after a wrong password ssh may ask
# again, and must not wait for an answer that never comes.
_ASKPASS = """\
#!/bin/sh
mkdir {asked} 2>/dev/null || exit 1
IFS= read -r word <{pipe} && printf '%s\\n' "$word"
"""
# As ssh-copy-id does it: closed to others, never twice, and behind a line that may lack its end.
_APPEND = """
umask 077
mkdir -p "$HOME/.ssh" && chmod 700 "$HOME/.ssh" || exit 1
file=$HOME/.ssh/authorized_keys
touch "$file" && chmod 600 "$file" || exit 1
if ! grep -qF {blob} "$file"; then
    [ -z "$(tail -c 1 "$file")" ] || printf '\\n' >>"$file" || exit 1
    printf '%s\\n' {line} >>"$file" || exit 1
fi
"""


@dataclass(frozen=True)
class OwnKey:
    """A key of the user: the private key's file, and the public line."""

    private: Path
    public: str
    made: bool = False


def own_key(identity: Path | None) -> OwnKey:
    """Return the user's key: `identity`, else one in ~/.ssh, else a new one made there.

    Raises UsageError when `identity` is no key whose public half can be had.
    """
    folder = Path.home() / ".ssh"
    if identity is None:
        found = [folder / name for name in _NAMES if (folder / name).is_file()]
        if not found:
            return _made(folder / _NAMES[0])
        identity = found[0]
    return OwnKey(identity, _public(identity))


def check_identity(identity: Path) -> Path:
    """Return the private key's file. Raises UsageError when it cannot be one."""
    path = identity.expanduser().absolute()
    if path.suffix == ".pub":
        path = path.with_suffix("")
    if not path.is_file():
        raise UsageError(f"no key file {path}; `ssh-keygen -t ed25519 -f {path}` makes one")
    if path.stat().st_mode & 0o077:
        raise UsageError(f"{path} is open to others, ssh will not use it; `chmod 600 {path}`")
    return path


def install(name: str, address: Address, keys: Sequence[str], own: OwnKey, password: str) -> Login:
    """Put the public key into the host's authorized_keys, logging in with `password`.

    The password goes through a pipe in a folder of mode 0700: it is in no command line, no
    environment and no file. Only the host with these host keys is spoken to.
    """
    if "\n" in password or "\0" in password:
        raise UsageError("a password is one line")
    line = own.public
    script = _APPEND.format(blob=shlex.quote(line.split()[1]), line=shlex.quote(line))
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        pipe, helper = Path(folder) / "pipe", Path(folder) / "askpass"
        os.mkfifo(pipe, 0o600)
        # Open for both: neither side waits, and the word stays in the pipe, never on a disk.
        end = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(end, f"{password}\n".encode())
            asked = shlex.quote(str(Path(folder) / "asked"))
            helper.write_text(_ASKPASS.format(asked=asked, pipe=shlex.quote(str(pipe))))
            helper.chmod(0o700)
            options = (
                "BatchMode=no",
                "PubkeyAuthentication=no",
                "NumberOfPasswordPrompts=1",
                "PreferredAuthentications=password,keyboard-interactive",
            )
            environment = {
                **os.environ,
                "SSH_ASKPASS": str(helper),
                "SSH_ASKPASS_REQUIRE": "force",
                # ssh before 8.4 knows no REQUIRE: it asks the helper when there is a display.
                "DISPLAY": os.environ.get("DISPLAY", ":0"),
            }
            open_address = replace(address, identity=None)
            done = log_in(name, open_address, keys, script, options=options, ssh_env=environment)
        finally:
            os.close(end)
    if done.kind == "wrong_key":
        refusal = Reason(f"{name}: {address.text} refuses the password, or accepts none")
        return replace(done, reason=refusal)
    return done


def _made(path: Path) -> OwnKey:
    """Return a key that was made here, or by another command just now."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path):
        return OwnKey(path, _public(path)) if path.exists() else _make(path)


def _make(path: Path) -> OwnKey:
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tunesmith", "-f", str(path)]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise TunesmithError(f"no key could be made in {path}: {' '.join(done.stderr.split())}")
    return OwnKey(path, _public(path), made=True)


def _public(private: Path) -> str:
    beside = private.with_name(f"{private.name}.pub")
    if beside.is_file():
        line = beside.read_text(encoding="utf-8").strip()
    else:
        argv = ["ssh-keygen", "-y", "-P", "", "-f", str(private)]
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        line = done.stdout.strip()
    if len(line.split()) < 2 or "\n" in line:
        raise UsageError(
            f"{private}: its public key is not beside it; `ssh-keygen -y -f {private} > {beside}` "
            "makes it"
        )
    return line
