"""Where things lie on a provisioned host, asked with one SSH command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.hosts.remote import Remote

# Finds tunesmith's folder as drift.sh does: on the first data disk that has one, else at home.
FIND_BASE = """
base=
for disk in "$@" "$HOME"; do
    [ -f "$disk/tunesmith/state.json" ] && base=$disk/tunesmith && break
done
"""
_LOOK = f"""{FIND_BASE}
printf 'base=%s\\n' "$base"
[ -n "$base" ] || exit 0
printf 'fingerprint=%s\\n' "$(sed -n 's/.*"fingerprint": "\\(.*\\)".*/\\1/p' "$base/state.json")"
printf 'free=%s\\n' "$(df -Pk "$base" | awk 'NR == 2 {{ print $4 }}')"
for environment in "$base"/envs/*/; do
    if [ -f "$environment/.tunesmith-environment.json" ]; then
        printf 'environment=%s\\n' "${{environment%/}}"
        printf 'made=%s\\n' "$(tr -d '\\n' <"$environment/.tunesmith-environment.json")"
    fi
done
. "$base/env.sh" && printf 'HF_HOME=%s\\n' "$HF_HOME"
"""


@dataclass(frozen=True)
class Layout:
    """What a provisioned host has, and where.

    `base` is tunesmith's folder on the data disk, `environment` the conda environment,
    `flavour` and `lock_sha256` what is installed there, `app` the short digest of the
    sources provisioning left (empty: unknown), `free_bytes` the room on the data disk.
    """

    base: PurePosixPath
    environment: PurePosixPath
    hf_home: PurePosixPath
    flavour: str
    lock_sha256: str
    app: str
    free_bytes: int

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
        """The store of base models (tunesmith.modelstore)."""
        return self.base / "models"

    @property
    def data(self) -> PurePosixPath:
        """LLaMA-Factory's data folder of the host."""
        return self.base / "data"

    @property
    def variables(self) -> PurePosixPath:
        """A POSIX sh file with the variables of every job; `.` reads it."""
        return self.base / "env.sh"


def look(remote: Remote, disks: Sequence[str]) -> Layout:
    """Return where things lie on a host.

    `disks` are the folders where platforms mount data disks, in the order of looking. Raises
    UsageError for a host that was not provisioned to the end.
    """
    done = remote.run(_LOOK, arguments=disks)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if done.returncode != 0:
        raise TunesmithError(
            f"{remote.name}: looking for tunesmith's folder failed; `inv provision --on "
            f"{remote.name}` mends it",
            done.stderr.splitlines()[-3:],
        )
    if not found.get("base") or not found.get("environment"):
        raise UsageError(
            f"{remote.name} is not provisioned; `inv provision --on {remote.name}` does it"
        )
    return _layout(found)


def _layout(found: Mapping[str, str]) -> Layout:
    made = json.loads(found["made"])
    asked = dict(part.split("=", 1) for part in found["fingerprint"].split(",") if "=" in part)
    return Layout(
        base=PurePosixPath(found["base"]),
        environment=PurePosixPath(found["environment"]),
        hf_home=PurePosixPath(found["HF_HOME"]),
        flavour=str(made["flavour"]),
        lock_sha256=str(made["lock_sha256"]),
        app=asked.get("app", ""),
        free_bytes=int(found["free"]) * 1024,
    )
