"""An inventory whose hosts are this machine, for tests that run Ansible for real."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import yaml

from tunesmith.project import Project


def local_hosts(root: Path, folder: Path, names: tuple[str, ...], **more: object) -> Project:
    """Return a project with hosts on this machine; `more` are variables by host.

    Each has its Ansible temporary files in a folder of its own below `folder`.
    """
    inventory = folder / "inventory"
    inventory.mkdir()
    hosts = {}
    for name in names:
        own = more.get(name, {})
        assert isinstance(own, dict)
        hosts[name] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "ansible_remote_tmp": str(folder / "remote-tmp"),
            "host_address": f"root@{name}.example.com:22",
        } | own
    text = yaml.safe_dump({"gpu_hosts": {"hosts": hosts}})
    (inventory / "hosts.yml").write_text(text, encoding="utf-8")
    blocks = (f"Host {name}\n  HostName 127.0.0.1\n  Port 9\n" for name in names)
    (inventory / "ssh_config").write_text("\n".join(blocks), encoding="utf-8")
    return _Project(root, folder / "home", inventory)


@dataclasses.dataclass(frozen=True)
class _Project(Project):
    own: Path

    @property
    def inventory(self) -> Path:
        return self.own
