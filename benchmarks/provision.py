"""Provisioning against the tutorial's own steps, on replicas of a rented host.

Reference: `conda create python=3.10`, `pip install` of the very versions in the lock, without
a cache, as on a new host. Ours: `inv provision`, which compiles what jobs import
and not, as pip does, every module. Each starts from a fresh replica with an empty
cache; both end with `llamafactory-cli version`. Then the host that is in state: the full
playbook and the fast path, three times each.

    PYTHONPATH=tests:src .venv/bin/python benchmarks/provision.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import yaml

from replica.build import BUNDLE, build
from replica.engine import docker, start_engine
from replica.replica import MIRROR, Options, Replica, mirror_content, running

ROOT = Path(__file__).resolve().parent.parent
FLAVOUR = "cu128"

TUTORIAL = f"""
set -e
. /root/miniconda3/etc/profile.d/conda.sh
conda create --yes --name tutorial --override-channels --channel {MIRROR}/conda-forge \\
    python=3.10 pip
conda activate tutorial
export PIP_CONFIG_FILE=/dev/null SSL_CERT_FILE={BUNDLE} PIP_CERT={BUNDLE} TMPDIR=/root/autodl-tmp
pip install --quiet --no-cache-dir --disable-pip-version-check --root-user-action ignore \\
    --requirement /root/autodl-tmp/versions.txt
llamafactory-cli version
"""


def main() -> int:
    """Run both and print the ratio."""
    engine = start_engine()
    try:
        images = build(print)
        with running(images, Options("autodl")) as host:
            reference = timed(lambda: tutorial(host))
            used = processor_seconds(host)
        say("tutorial: conda create, pip install, llamafactory-cli version", reference)
        if used is not None:
            say("  processor time of the host", used)
        with running(images, Options("autodl")) as host, tempfile.TemporaryDirectory() as scratch:
            inv = Inv(host, Path(scratch))
            cold = timed(lambda: inv("provision", *inv.where))
            say("inv provision, cold", cold)
            used = processor_seconds(host)
            if used is not None:
                say("  processor time of the host", used)
            full = median(timed(lambda: inv("provision", *inv.where, "--full")) for _ in range(3))
            say("inv provision --full, in state (median of 3)", full)
            fast = median(timed(lambda: inv("provision", *inv.where)) for _ in range(3))
            say("inv provision, in state (median of 3)", fast)
        print(f"ratio cold: {cold / reference:.2f} of the tutorial's time (goal: at most 0.33)")
        print(f"full playbook: {full:.1f} s (goal: at most 10); fast path: {fast:.2f} s (1.5)")
    finally:
        engine.stop()
    return 0


def tutorial(host: Replica) -> None:
    """Do the tutorial's steps on the host."""
    lock = (ROOT / "configs" / "locks" / f"{FLAVOUR}.txt").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^([A-Za-z0-9_.-]+==[^ \\]+)", lock)
    done = host.ssh("cat > /root/autodl-tmp/versions.txt", text="\n".join(versions) + "\n")
    if done.returncode == 0:
        done = host.ssh("bash -s", text=TUTORIAL)
    if done.returncode != 0:
        raise SystemExit(f"the tutorial's steps failed:\n{done.stdout}\n{done.stderr}")


class Inv:
    """`inv` in this clone, with an inventory of its own that knows one host."""

    def __init__(self, host: Replica, scratch: Path) -> None:
        self._env = {
            **os.environ,
            "TUNESMITH_INVENTORY": str(scratch / "inventory"),
            "TUNESMITH_HOME": str(scratch / "home"),
            "HOME": str(scratch),
        }
        mirror = scratch / "replica.yml"
        mirror.write_text(yaml.safe_dump(mirror_content()), encoding="utf-8")
        self.where = ("--on", "bench", "--mirror", str(mirror), "--flavour", FLAVOUR)
        self("host.add", "bench", host.address, "--identity", str(host.key))

    def __call__(self, *words: str) -> None:
        argv = [sys.executable, "-m", "invoke", *words]
        done = subprocess.run(
            argv, cwd=ROOT, env=self._env, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"inv {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")


def timed(work: Callable[[], None]) -> float:
    """Return the seconds `work()` takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def say(what: str, seconds: float) -> None:
    """Print one figure."""
    print(f"{seconds:8.1f} s  {what}", flush=True)


def processor_seconds(host: Replica) -> float | None:
    """Return the processor time that a host has used; None where cgroup does not tell.

    Other work on this machine stretches the time on the clock, and this hardly.
    """
    shown = docker("inspect", "--format", "{{json .Id}}", host.container).stdout
    name = json.loads(shown)
    for file, unit in (
        (Path(f"/sys/fs/cgroup/cpuacct/docker/{name}/cpuacct.usage"), 1e9),
        (Path(f"/sys/fs/cgroup/system.slice/docker-{name}.scope/cpu.stat"), 1e6),
    ):
        if file.exists():
            return int(re.sub(r"\D+", " ", file.read_text()).split()[0]) / unit
    return None


if __name__ == "__main__":
    sys.exit(main())
