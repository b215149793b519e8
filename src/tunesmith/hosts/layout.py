"""Where things lie on a provisioned host, asked with one SSH command."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts.answers import (
    DIGEST,
    HOST_PATH,
    WORD,
    AnswerSource,
    HostPath,
    Named,
    Number,
    OneOf,
    Record,
    Shape,
    Text,
    fields,
    parse_json,
)
from tunesmith.hosts.platforms import data_disks
from tunesmith.hosts.remote import Remote

# Sets $environment, the finished training environment below $base.
FIND_ENVIRONMENT = """
environment=
for folder in "$base"/envs/*/; do
    [ -f "$folder.tunesmith-environment.json" ] && environment=${folder%/}
done
"""
_LOOK = f"""
printf 'base=%s\\n' "$base"
[ -n "$base" ] || exit 0
{FIND_ENVIRONMENT}
printf 'environment=%s\\n' "$environment"
[ -n "$environment" ] || exit 0
printf 'made=%s\\n' "$(tr -d '\\n' <"$environment/.tunesmith-environment.json")"
printf 'fingerprint=%s\\n' "$(sed -n 's/.*"fingerprint": "\\(.*\\)".*/\\1/p' "$base/state.json")"
printf 'free=%s\\n' "$(df -Pk "$base" | awk 'NR == 2 {{ print $4 }}')"
[ ! -f "$base/mirror.yml" ] || printf 'mirror=%s\\n' "$base/mirror.yml"
printf 'sudo=%s\\n' "$([ "$(id -u)" -eq 0 ] || printf 'sudo -n')"
. "$base/env.sh" && printf 'HF_HOME=%s\\n' "$HF_HOME"
"""
# What each line may say; they are used in paths and commands.
_FIELDS: Mapping[str, Shape] = {
    "base": HostPath(rf"|{HOST_PATH.pattern}"),
    "environment": HostPath(rf"|{HOST_PATH.pattern}"),
    "made": Text(r"[^\n]*", 1 << 16, "a line of JSON"),
    "fingerprint": Text(r"[\w =,.:+/~-]*", 2000, "the words of a state's fingerprint"),
    "free": Number(0, 1 << 50),
    "mirror": HOST_PATH,
    "sudo": OneOf(("", "sudo -n")),
    "HF_HOME": HOST_PATH,
}
_MADE = Record({"flavour": WORD, "lock_sha256": DIGEST}, {"extras": Named(WORD, DIGEST)})


@dataclass(frozen=True)
class Layout:
    """What a provisioned host has, and where.

    `base` is tunesmith's folder on the data disk, `environment` the conda environment,
    `flavour`, `lock_sha256` and `extras` what is installed there, `asked` what it was provisioned
    for (the parts of the state's fingerprint), `free_bytes` the room on the data disk, `mirror`
    the mirror profile for downloads there (a name, or a file there), `sudo` what an
    administrator's command begins with there.
    """

    base: PurePosixPath
    environment: PurePosixPath
    hf_home: PurePosixPath
    flavour: str
    lock_sha256: str
    extras: tuple[str, ...]
    asked: Mapping[str, str]
    free_bytes: int
    mirror: str
    sudo: tuple[str, ...]

    @property
    def disk(self) -> PurePosixPath:
        """The data disk."""
        return self.base.parent

    @property
    def app(self) -> str:
        """The short digest of tunesmith's sources there; empty: unknown."""
        return self.asked.get("app", "")

    @property
    def python(self) -> PurePosixPath:
        """The interpreter of the training environment."""
        return self.environment / "bin" / "python"

    @property
    def runs(self) -> PurePosixPath:
        """The folder of run folders."""
        return self.base / "runs"

    @property
    def models(self) -> PurePosixPath:
        """The store of base models (tunesmith.basemodel.store)."""
        return self.base / "models"

    @property
    def data(self) -> PurePosixPath:
        """LLaMA-Factory's data folder of the host."""
        return self.base / "data"

    @property
    def variables(self) -> PurePosixPath:
        """A POSIX sh file with the variables of every job; `.` reads it."""
        return self.base / "env.sh"


@functools.cache
def find_base() -> str:
    """Return shell that sets $base as drift.sh finds it: tunesmith's folder.

    The start files name it (preflight_base may have put it anywhere), else it is on the first
    data disk that has one. Raises UsageError where configs/platforms.yml is at fault.
    """
    return f"""
ours='/^# BEGIN tunesmith/,/^# END tunesmith/'
base=$(sed -n "$ours s/^if \\[ -r '*\\(.*\\)\\/env\\.sh'* \\]; .*/\\1/p" \\
    "$HOME/.bashrc" "$HOME/.bash_profile" "$HOME/.bash_login" "$HOME/.profile" 2>/dev/null |
    head -n 1)
[ -f "$base/state.json" ] || base=
for disk in {" ".join(data_disks())} "$HOME"; do
    [ -z "$base" ] || break
    [ -f "$disk/tunesmith/state.json" ] && base=$disk/tunesmith
done
"""


def look(remote: Remote) -> Layout:
    """Return where things lie on a host.

    Raises UsageError for a host that was not provisioned to the end, TunesmithError for one
    that answers what no such host does.
    """
    done = remote.run(find_base() + _LOOK)
    asked = AnswerSource(remote.name, "its layout")
    found = fields(asked, done.stdout.split("\n"), _FIELDS)
    if not found.get("base") or not found.get("environment"):
        raise not_provisioned(remote.name)
    if done.returncode != 0 or _FIELDS.keys() - found.keys() - {"mirror"}:
        raise TunesmithError(
            f"{remote.name}: {found['base']} cannot be read",
            done.stderr.splitlines()[-3:],
            hint=f"`inv provision --on {remote.name}` repairs it",
        )
    return _layout(asked, found)


def not_provisioned(name: str) -> UsageError:
    """Return the error for a host without tunesmith's folder."""
    return UsageError(f"{name} is not provisioned", hint=f"`inv provision --on {name}` does it")


def _layout(asked: AnswerSource, found: Mapping[str, Any]) -> Layout:
    made = _MADE.read(asked.at("made"), parse_json(asked.at("made"), found["made"]))
    parts = found["fingerprint"].split(",")
    return Layout(
        base=PurePosixPath(found["base"]),
        environment=PurePosixPath(found["environment"]),
        hf_home=PurePosixPath(found["HF_HOME"]),
        flavour=str(made["flavour"]),
        lock_sha256=str(made["lock_sha256"]),
        extras=tuple(made.get("extras", {})),
        asked=dict(part.split("=", 1) for part in parts if "=" in part),
        free_bytes=found["free"] * 1024,
        mirror=found.get("mirror") or "default",
        sudo=tuple(found["sudo"].split()),
    )
