"""The probe's script, what it printed as values that tasks can ask, and the digest of a file."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleFilterError

from tunesmith.core.errors import TunesmithError
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.hosts.platforms import data_disks
from tunesmith.hosts.probe.answer import Answer
from tunesmith.hosts.probe.gpu import Cuda, Gpus
from tunesmith.hosts.probe.host import Places, System, User
from tunesmith.hosts.probe.installed import Environment, Environments, Installation
from tunesmith.hosts.probe.script import ProbeSettings, script
from tunesmith.hosts.probe.software import Condas, Programs

_SECTIONS = (User, System, Places, Environments, Installation, Gpus, Cuda, Programs, Condas)
_LONGEST = 4 << 20
# What a C compiler needs beside itself; packages install it with the compiler.
_C_HEADER = "stdlib.h"


def host_probe(disks: Sequence[str], base: str, environment: str, programs: Sequence[str]) -> str:
    """Return the script that looks at a host; without `disks` for those of the platforms.

    Raises AnsibleFilterError for a disk or a program that is no word.
    """
    settings = ProbeSettings(
        base=str(base),
        environment=str(environment),
        programs=tuple(map(str, programs)),
        disks=tuple(map(str, disks)) or data_disks(),
    )
    try:
        return script([section.SECTION for section in _SECTIONS], settings)
    except TunesmithError as error:
        raise AnsibleFilterError(error.message) from None


def host_facts(printed: str, environment: str, programs: Sequence[str]) -> dict[str, Any]:
    """Return what the script of `host_probe` printed, as plain values.

    An environment whose marker is not JSON is not finished. Raises AnsibleFilterError for an
    answer that is not whole, or a value that is not what its key says.
    """
    try:
        return _facts(printed, environment, programs)
    except TunesmithError as error:
        raise AnsibleFilterError(error.message) from None


def _facts(printed: str, environment: str, programs: Sequence[str]) -> dict[str, Any]:
    if len(printed) > _LONGEST:
        raise TunesmithError(f"the host: its probe says {len(printed)} characters")
    answer = Answer(printed, "the host", _SECTIONS)
    user, system, places = answer.of(User), answer.of(System), answer.of(Places)
    installation, room = answer.of(Installation), places.room
    there = answer.of(Programs)
    missing = [name for name in programs if name not in there.programs]
    condas = answer.of(Condas).condas
    own = answer.of(Environments).at(f"{places.base}/envs/{environment}") or Environment("", False)
    return {
        "absent": list(installation.absent),
        "app": installation.app,
        "architecture": system.arch,
        "base": places.base,
        "busy": installation.busy,
        "conda": condas[0].path if condas else "",
        "data_disk": places.data_disk,
        "digest": dict(installation.digests),
        "environment": {
            "flavour": own.flavour,
            "lock_sha256": own.lock_sha256,
            "refused": own.refused,
            "self_test": own.self_test,
        },
        "epoch": system.epoch,
        "free_inodes": (room.inodes_free if room else None) or 0,
        # Where df does not say, nothing is known to be free.
        "free_kib": room.free // 1024 if room else 0,
        "fresh": installation.fresh,
        "glibc": system.glibc,
        "gpu": list(answer.of(Gpus).lines),
        "hf_cache": places.hf_cache,
        "home": user.home,
        "inodes": (room.inodes if room else None) or 0,
        "installed": installation.installed,
        "locked": list(installation.locked),
        "login": user.login_file,
        "marker": ENVIRONMENT_MARKER,
        "missing": [*missing, *([] if there.c_headers else [_C_HEADER])],
        "registered": installation.registered,
        "sudo": system.sudo == "yes",
        "toolkit": {t.version or "": t.path for t in answer.of(Cuda).toolkits},
        "uid": user.uid,
        "used_kib": installation.used_kib,
        "writable": places.writable,
    }


def file_sha256(path: str) -> str:
    """Return the digest of a file on the machine Ansible runs on."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def as_archive(sources: Mapping[str, str]) -> str:
    """Return base64 of a tar.gz: by its name there, a file or a folder of this machine.

    It depends on names and contents alone.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as archive:
        for name, source in sorted(sources.items()):
            top = Path(source)
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                if path.is_file():
                    inside = f"{name}/{path.relative_to(top).as_posix()}" if path != top else name
                    entry = tarfile.TarInfo(inside)
                    content = path.read_bytes()
                    entry.size, entry.mode = len(content), 0o600
                    archive.addfile(entry, io.BytesIO(content))
    return base64.encodebytes(stream.getvalue()).decode()


class FilterModule:
    """Ansible's way to find the filters of a file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "as_archive": as_archive,
            "file_sha256": file_sha256,
            "host_facts": host_facts,
            "host_probe": host_probe,
        }
