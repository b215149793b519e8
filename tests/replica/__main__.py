"""Replica hosts by hand: PYTHONPATH=tests:src python -m replica start|list|destroy|build."""

from __future__ import annotations

import argparse
import shutil
import sys

from replica import replica
from replica.build import KINDS, build
from replica.engine import docker, start_engine, state


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="replica", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    starting = commands.add_parser("start")
    starting.add_argument("kind", choices=KINDS)
    starting.add_argument("--name")
    starting.add_argument("--gpu", choices=replica.GPU_MODES, default="no_gpu")
    starting.add_argument("--memory")
    starting.add_argument("--disk-bytes", type=int)
    starting.add_argument("--disk-inodes", type=int)
    starting.add_argument("--warm", action="store_true")
    commands.add_parser("list")
    for word in ("destroy", "rebuild", "reboot", "keep-warm"):
        commands.add_parser(word).add_argument("name")
    mode = commands.add_parser("gpu")
    mode.add_argument("name")
    mode.add_argument("mode", choices=replica.GPU_MODES)
    commands.add_parser("purge", help="remove every replica host, disk, cache and image")
    arguments = parser.parse_args()
    start_engine()
    if arguments.command == "purge":
        return _purge()
    if arguments.command == "list":
        for name in replica.names():
            _show(replica.find(name))
        return 0
    if arguments.command in ("build", "start"):
        images = build(print)
        if arguments.command == "build":
            print(images)
            return 0
        options = replica.Options(
            kind=arguments.kind,
            gpu=arguments.gpu,
            memory=arguments.memory,
            disk_bytes=arguments.disk_bytes,
            disk_inodes=arguments.disk_inodes,
            warm=arguments.warm,
        )
        _show(replica.start(images, options, arguments.name))
        return 0
    found = replica.find(arguments.name)
    if arguments.command == "gpu":
        found.set_mode(arguments.mode)
    elif arguments.command == "keep-warm":
        found.keep_warm()
    else:
        getattr(found, arguments.command)()
    return 0


def _show(found: replica.Replica) -> None:
    print(f"{found.name}  {found.address} -i {found.key}  (password {found.password})")


def _purge() -> int:
    for name in replica.names():
        replica.find(name).destroy()
    listed = docker("image", "ls", "--quiet", "tunesmith-replica*").stdout.split()
    if listed:
        docker("image", "rm", "--force", *listed)
    docker("builder", "prune", "--all", "--force")
    shutil.rmtree(state())
    return 0


if __name__ == "__main__":
    sys.exit(main())
