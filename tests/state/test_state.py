"""One promise a test; its docstring is what `inv host.verify` prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.state.conftest import ROOT, Place
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.stack.definition import Flavour, Stack
from tunesmith.stack.sources import app_digest

# Pairs of a package's name and version in a lock, and what conda itself puts beside them.
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)
CONDAS_OWN = {"pip", "setuptools", "wheel", "packaging"}

SHELLS = {
    "a command over ssh": "env",
    "a login shell": "bash -lc env",
    "an interactive shell": "bash -ic env",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock(place: Place, flavour: Flavour) -> None:
    """The environment was finished, from the lock as it is now."""
    assert place.marker["lock_sha256"] == flavour.lock_sha256


def test_python(place: Place, stack: Stack) -> None:
    """Its Python is the stack's."""
    found = place.python("import sys; print('%d.%d' % sys.version_info[:2])").strip()
    assert found == stack.python


def test_conda_finds_it_by_name(provisioned: Place, stack: Stack) -> None:
    """conda activate finds the environment by its name."""
    find = (
        'for c in $(sed -n "s/^# cmd: \\(\\/[^ ]*\\) .*/\\1/p" "$1/conda-meta/history") '
        '"$2/miniforge3/bin/conda" "$HOME/miniconda3/bin/conda" /opt/conda/bin/conda; do '
        '[ -x "$c" ] && echo "$c" && break; done'
    )
    conda = provisioned.script(find, provisioned.environment, provisioned.base).strip()
    assert conda, "there is no conda"
    activate = (
        f". {Path(conda).parents[1]}/etc/profile.d/conda.sh && "
        f"conda activate {stack.environment_name} && command -v python"
    )
    found = provisioned.run("bash -c %s", activate).strip()
    assert found == f"{provisioned.environment}/bin/python"


def test_llamafactory(place: Place, stack: Stack) -> None:
    """llamafactory-cli version answers with the stack's version."""
    # It runs torchrun and friends from PATH, as a job does.
    text = 'PATH="$1/bin:$PATH"; cd "$2"; exec "$1/bin/llamafactory-cli" version'
    out = place.script(text, place.environment, place.base)
    assert stack.llamafactory in re.findall(r"\d+(?:\.\d+)+", out)


def test_packages(place: Place, flavour: Flavour) -> None:
    """The packages are those of the lock, each in its version."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([[d.metadata['Name'], d.version] for d in m.distributions()]))"
    )
    found = {normal(name): version for name, version in json.loads(place.python(code))}
    wanted = {normal(n): v for n, v in PIN.findall(flavour.lock.read_text(encoding="utf-8"))}
    others = {n: found.get(n) for n, version in wanted.items() if found.get(n) != version}
    assert not others, f"not of the lock: {others}"
    assert set(found) - set(wanted) <= CONDAS_OWN


def test_bytecode(place: Place) -> None:
    """The modules that every job imports are compiled, so that it starts in seconds."""
    code = (
        "import importlib.util, os, sys; sys.dont_write_bytecode = True; import torch, "
        "llamafactory.launcher; files = [m.__file__ for m in list(sys.modules.values()) "
        "if str(getattr(m, '__file__', '')).endswith('.py')]; print(len(files), sum("
        "os.path.exists(importlib.util.cache_from_source(f)) for f in files))"
    )
    imported, compiled = map(int, place.python(code).split())
    assert compiled >= 0.95 * imported > 0, f"{compiled} of {imported}"


@pytest.mark.parametrize("shell", SHELLS)
def test_variables(place: Place, stack: Stack, shell: str) -> None:
    """The variables of Hugging Face and of the stack are there in every kind of shell."""
    lines = place.run(SHELLS[shell]).splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert found.get("HF_HOME", "").startswith(f"{place.disk}/"), f"HF_HOME in {shell}"
    assert found.get("PYTHONNOUSERSITE") == "1"
    for name, value in stack.variables.items():
        assert found.get(name) == value, f"{name} in {shell}"


@pytest.mark.parametrize("shell", SHELLS)
def test_endpoint(provisioned: Place, shell: str) -> None:
    """The hub's address is there in every kind of shell."""
    # Only where a host was provisioned: what differs per region is in no image.
    lines = provisioned.run(SHELLS[shell]).splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert re.match(r"https://|http://127\.0\.0\.1", found.get("HF_ENDPOINT", "")), shell


def test_data_disk(provisioned: Place) -> None:
    """Models and environments lie on the file system of the data disk."""
    text = (
        '. "$1/env.sh"; for p in "$1" "$HF_HOME" "$1/envs" "$1/cache"; do '
        'while [ ! -e "$p" ]; do p=${p%/*}; done; '
        'stat -c %d "$p"; done'
    )
    assert len(set(provisioned.script(text, provisioned.base).split())) == 1


def test_token(provisioned: Place) -> None:
    """The Hugging Face token, where there is one, is its owner's alone."""
    text = '[ ! -e "$1/token" ] || stat -c "%a %u" "$1/token"; id -u'
    *mode, user = provisioned.script(text, provisioned.base).split()
    if not mode:
        pytest.skip("no token was left on this host")
    assert mode == ["600", user]


def test_private(provisioned: Place) -> None:
    """Nobody else can look into our folder."""
    user = provisioned.run("id -u").strip()
    assert provisioned.run("stat -c %s %s", "%a %u", provisioned.base).split() == ["700", user]


def test_no_half_made_environment(provisioned: Place, stack: Stack) -> None:
    """Nothing half-made is left of an interrupted run."""
    text = (
        'cd "$1/envs" && ls -A; cd "$1"; '
        'for e in envs/*/; do [ -e "$e$2" ] || echo "$e is not finished"; done; '
        "for f in .state.json.* envs/*/.tunesmith-fresh token.part; do "
        '[ ! -e "$f" ] || echo "$f"; done'
    )
    assert provisioned.script(text, provisioned.base, ENVIRONMENT_MARKER).split() == [
        stack.environment_name
    ]


def test_tunesmith(place: Place) -> None:
    """tunesmith there is this clone's, and imports with the lock alone."""
    found = place.python(
        "import tunesmith.job.supervisor.worker, tunesmith as t; print(t.__file__)"
    ).strip()
    folder = Path(found).parents[2].name
    assert found.startswith(f"{place.base}/app/")
    if folder == "app":  # the image's: its name is no digest
        ask = "import tunesmith.stack.sources as a, pathlib as p; print(a.app_digest(p.Path('%s')))"
        folder = place.python(ask % f"{place.base}/app").strip()
    assert app_digest(ROOT).startswith(folder), "its sources are not this clone's"


def test_data(place: Place) -> None:
    """LLaMA-Factory's data folder is there, with the registry."""
    registry = json.loads(place.run("cat %s", f"{place.data}/dataset_info.json"))
    assert registry


def test_recorded(provisioned: Place) -> None:
    """What was done is recorded, for its owner alone."""
    text = 'cat "$1/state.json"; stat -c "%a" "$1/state.json"'
    recorded, _, mode = provisioned.script(text, provisioned.base).strip().rpartition("\n")
    assert json.loads(recorded)["found"]
    assert mode == "600"


def test_nothing_listens(place: Place) -> None:
    """Nothing of ours listens to others than the host itself."""
    # Sockets of processes whose program lies in our folder, and all listening sockets.
    text = (
        'for p in /proc/[0-9]*; do e=$(readlink "$p/exe" 2>/dev/null); case $e in "$1"/*) '
        'ls -l "$p/fd" 2>/dev/null | sed -n "s/.*socket:\\[\\([0-9]*\\)\\].*/ours \\1/p";; esac; '
        "done; cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk '$4 == \"0A\" {print $2, $10}'"
    )
    lines = [line.split() for line in place.script(text, place.base).splitlines()]
    ours = {number for kind, number in lines if kind == "ours"}
    # Loopback as the kernel writes it: 127.0.0.1, ::1, and 127.0.0.1 inside IPv6.
    loopback = re.compile(r"^(?:......7F|0{24}01000000|0{16}FFFF0000......7F):")
    open_to_all = [a for a, number in lines if number in ours and not loopback.match(a)]
    assert not open_to_all


def test_gpu(place: Place) -> None:
    """torch sees the GPU and has code for it."""
    done = place.host.run("nvidia-smi --query-gpu=name --format=csv,noheader")
    if done.rc != 0:
        pytest.skip("no GPU is seen on this host (no-GPU mode)")
    if not place.script("ls /dev/nvidia[0-9]* 2>/dev/null || true"):
        pytest.skip("nvidia-smi answers, and there is no device: a stand-in")
    code = (
        "import torch; x = torch.ones(64, 64, device='cuda', requires_grad=True); "
        "(x @ x).sum().backward(); torch.cuda.synchronize(); print(torch.cuda.device_count())"
    )
    assert int(place.python(code)) == len(done.stdout.splitlines())
