"""What a fresh host receives until it can train: by its interface, not by files on its disk.

`cold-bytes`: the command path of the README (`inv provision`, then a training, which lets the host
fetch its base model) against the sum of what is needed, the lock's files and the model's. Beside
it the tutorial's own steps on a second fresh host (`conda create`, `pip install` of the very
versions in the lock, `huggingface-cli download`). All counts: what our SSH brings too, indexes,
system packages, TLS, and what the replica's own conda channel gives on lo. Headers of packets do
not, as a file's size has none: the kernel's bytes less 66 a packet (4 % of full frames).

`cold-killed`: a third fresh host, on which every process is killed (SIGKILL), the client too,
when half of the bytes have come, and once more at half of the model. The same commands are given
again; what has come in the end above the undisturbed run was fetched twice.

PyPI is the real one; the base model comes from a hub of this machine through the host's line.
The gate: on all three hosts `llamafactory-cli version` answers and the model has its sha256.

BENCH_SKIP=cold-killed leaves the kill out, cold-other the tutorial. Needs root and Docker.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib
import yaml
from packaging.tags import Tag, compatible_tags, cpython_tags, platform_tags
from packaging.utils import parse_wheel_filename
from uv import find_uv_bin

from benchmarks.harness import ROOT, CommandFailed, Result
from benchmarks.provision import BASE, ENVIRONMENT, FLAVOUR, NAME, TUTORIAL
from hubserver import Hub
from replica.build import BUNDLE, Images, build
from replica.engine import NEEDS, NoEngine, start_engine
from replica.network import Traffic, gateway, kill_work, lead_here, shape, traffic
from replica.replica import Options, Replica, mirror_content, running, sweep
from replica_fixtures import HostProject, clone
from tunesmith.core import formats
from tunesmith.project import Project

# Not the hub's own name: the weights here come from a GGUF, and those of that name are pinned.
MODEL = "bench/SmolLM2-135M-Instruct"
STORED = "HuggingFaceTB--SmolLM2-135M-Instruct@*"
WEIGHTS = "model.safetensors"
# One step, nothing measured: what a training needs has come before it.
READY = ("train", "--on", NAME, "--no-evaluate", f"model_name_or_path={MODEL}")
READY += ("max_steps=1", "save_steps=1", "max_samples=16", "eval_strategy=no", "val_size=0")
DOWNLOAD = """
export HF_ENDPOINT={endpoint} HF_HUB_DISABLE_XET=1
huggingface-cli download {model} --local-dir /root/autodl-tmp/model >/dev/null
"""
KILLED = (
    f"inv provision --on {NAME} --flavour {FLAVOUR}"
    "  # at half of the bytes: kill -9 of every process on the host, and of this one\n"
    f"inv provision --on {NAME} --flavour {FLAVOUR}\n"
    f"inv train --on {NAME}  # the same"
)
_TICK = 0.1
Say = Callable[[str], None]


def run(work: Path, say: Say) -> list[Result]:
    """Measure both rows, or what BENCH_SKIP leaves."""
    left_out = set(os.environ.get("BENCH_SKIP", "").split(","))
    with prepared(say) as (images, hub):
        needed = needed_bytes(hub, say)
        say(f"  needed: {formats.size(sum(needed.values()))}")
        ours = _ours(images, hub, work / "ours", say)
        other = None if "cold-other" in left_out else _other(images, hub, say)
        results = [_bytes(needed, ours, other)]
        if "cold-killed" not in left_out:
            results.append(_killed(images, hub, work / "killed", needed, ours, say))
    return results


@contextlib.contextmanager
def prepared(say: Say) -> Iterator[tuple[Images, Hub]]:
    """Yield the images of replicas and a hub that serves the small model to them."""
    folder = stored_model()
    try:
        engine = start_engine()
    except NoEngine as missing:
        raise CommandFailed(f"{missing}; `{NEEDS}`, as root") from None
    try:
        sweep()
        images = build(say)
        with Hub(gateway()) as hub:
            names = (path for path in folder.iterdir() if path.name != "tunesmith-model.json")
            hub.add(MODEL, {path.name: path.read_bytes() for path in names})
            yield images, hub
    finally:
        engine.stop()


def stored_model() -> Path:
    """Return the small model's folder in this clone's store."""
    found = sorted(Project.at(ROOT).models.glob(STORED))
    if not found:
        raise CommandFailed("no SmolLM2-135M-Instruct here: `inv demo` fetches it")
    return found[-1]


def project_of(images: Images, folder: Path, host: Replica, hub: Hub) -> HostProject:
    """Make a clone of its own whose mirror names the hub, and let the host reach that."""
    folder.mkdir(parents=True)
    project = clone(images, ROOT, folder)
    lead_here(host, hub.port)
    content = mirror_content(hf_endpoints=[endpoint(hub)])
    project.mirror.write_text(yaml.safe_dump(content), encoding="utf-8")
    return project


def endpoint(hub: Hub) -> str:
    """Return the hub's address as a host knows it."""
    return f"http://127.0.0.1:{hub.port}"


def inv(project: HostProject, *words: str) -> str:
    """Run `inv` to a good end; return what it printed."""
    done = project.inv(*words)
    if done.returncode:
        text = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        raise CommandFailed(f"inv {' '.join(words)}:\n{text}")
    return done.stdout


def add_words(project: HostProject, host: Replica) -> tuple[str, ...]:
    """Return the words of `inv` that make the host known."""
    return ("host.add", NAME, host.address, "--identity", str(project.key))


def provision_words(project: HostProject) -> tuple[str, ...]:
    """Return the words of `inv` that bring the host to its state."""
    return ("provision", "--on", NAME, "--mirror", str(project.mirror), "--flavour", FLAVOUR)


def on_host(host: Replica, script: str, what: str) -> str:
    """Run a bash script through SSH to a good end; return what it printed."""
    done = host.ssh("bash -s", text=script)
    if done.returncode != 0:
        raise CommandFailed(f"{what}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def send_versions(host: Replica) -> None:
    """Bring the tutorial's list of packages to the host: the lock's versions."""
    lock = (ROOT / "configs" / "locks" / f"{FLAVOUR}.txt").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^([A-Za-z0-9_.-]+==[^ \\]+)", lock)
    done = host.ssh("cat >/root/autodl-tmp/versions.txt", text="\n".join(versions) + "\n")
    if done.returncode != 0:
        raise CommandFailed(f"the tutorial's list of packages: {done.stderr.strip()}")


def download_script(hub: Hub) -> str:
    """Return the tutorial's download of the model, to follow its TUTORIAL."""
    return DOWNLOAD.format(endpoint=endpoint(hub), model=MODEL)


# --- what is needed ------------------------------------------------------------------------


def needed_bytes(hub: Hub, say: Say) -> dict[str, int]:
    """Return the bytes of the lock's files, as the index tells them, and of the model's."""
    say("  asking the index for the sizes of the lock's files")
    lock = ROOT / "configs" / "locks" / f"{FLAVOUR}.txt"
    argv = [find_uv_bin(), "pip", "compile", "--quiet", "--no-deps", "--format", "pylock.toml"]
    argv += ["--python-version", "3.10", str(lock)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandFailed(f"sizes of the lock's files: {done.stderr[-2000:]}")
    model = sum(map(len, hub.repos[MODEL].files.values()))
    return {"lock": lock_bytes(tomllib.loads(done.stdout), host_tags()), "model": model}


def host_tags() -> list[Tag]:
    """Return the tags that Python 3.10 takes on this machine, the best first."""
    platforms = list(platform_tags())
    tags = [*cpython_tags((3, 10), platforms=platforms, abis=["cp310"])]
    return [*tags, *compatible_tags((3, 10), "cp310", platforms)]


def lock_bytes(pylock: Mapping[str, Any], tags: Iterable[Tag]) -> int:
    """Return the sum of the files that are installed: a package's best wheel, else its sdist.

    `pylock` as `uv pip compile --format pylock.toml` writes it. Raises CommandFailed for a
    package with neither.
    """
    rank = {tag: number for number, tag in enumerate(tags)}
    total = 0
    for package in pylock["packages"]:
        fitting = []
        for wheel in package.get("wheels", ()):
            named = parse_wheel_filename(wheel["url"].rpartition("/")[2].split("#")[0])[3]
            ranks = [rank[tag] for tag in named if tag in rank]
            fitting += [(min(ranks), wheel["size"])] if ranks else []
        if fitting:
            total += min(fitting)[1]
        elif "sdist" in package:
            total += package["sdist"]["size"]
        else:
            raise CommandFailed(f"{package['name']}: the lock has no file of it for this machine")
    return total


# --- both sides ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Came:
    """What a host had received when it was provisioned, and when it could train.

    Of that, in bytes: the files of Debian packages, and one pass over the index's lists of the
    lock's packages.
    """

    provisioned: Traffic
    ready: Traffic
    debian: int = 0
    lists: int = 0


def _ours(images: Images, hub: Hub, folder: Path, say: Say) -> _Came:
    say("ours: inv provision, inv train")
    with running(images, Options("autodl")) as host:
        project = project_of(images, folder, host, hub)
        before = traffic(host)
        inv(project, *add_words(project, host))
        inv(project, *provision_words(project))
        provisioned = traffic(host) - before
        inv(project, *READY)
        ready = traffic(host) - before
        _gate(host, hub)
        debian = int(host.sh("cat /var/cache/apt/archives/*.deb | wc -c"))
        came = _Came(provisioned, ready, debian, _lists(host))
    shutil.rmtree(folder)
    say(f"  {_amounts(came.provisioned)}, then {_amounts(came.ready)}")
    return came


def _lists(host: Replica) -> int:
    """Return the bytes of the index's lists of all the lock's packages."""
    before = traffic(host)
    lock = ROOT / "configs" / "locks" / f"{FLAVOUR}.txt"
    script = f"SSL_CERT_FILE={BUNDLE} {BASE}/uv/bin/uv pip compile --quiet --no-cache --no-deps "
    script += "--format pylock.toml --python-version 3.10 --python "
    script += f"{ENVIRONMENT}/bin/python /root/lock.txt"
    host.exec(["tee", "/root/lock.txt"], text=lock.read_text(encoding="utf-8"))
    on_host(host, script, "the index's lists")
    return (traffic(host) - before).received


def _other(images: Images, hub: Hub, say: Say) -> _Came:
    say("the tutorial's steps")
    with running(images, Options("autodl")) as host:
        lead_here(host, hub.port)
        before = traffic(host)
        send_versions(host)
        # One shell: the second part works in the environment of the first.
        on_host(host, TUTORIAL + download_script(hub), "the tutorial's steps")
        came = _Came(traffic(host) - before, traffic(host) - before)
        wanted = hashlib.sha256(hub.repos[MODEL].files[WEIGHTS]).hexdigest()
        if wanted not in host.sh(f"sha256sum /root/autodl-tmp/model/{WEIGHTS}"):
            raise CommandFailed("the tutorial's download of the model has another sha256")
    say(f"  {_amounts(came.ready)}")
    return came


def _killed(
    images: Images, hub: Hub, folder: Path, needed: Mapping[str, int], calm: _Came, say: Say
) -> Result:
    say("ours, killed at half")
    with running(images, Options("autodl")) as host:
        project = project_of(images, folder, host, hub)
        before = traffic(host)
        inv(project, *add_words(project, host))
        half = calm.provisioned.arrived // 2
        at = _kill_when(host, project, provision_words(project), before, half, say)
        again = traffic(host)
        inv(project, *provision_words(project))
        provisioned = traffic(host)
        say(f"  then {formats.size((provisioned - again).arrived)} to the end of provisioning")
        half = needed["model"] // 2
        # As fast as from this machine, all of it would have come between two looks.
        shape(host, "400mbit", "1gbit")
        _kill_when(host, project, READY, provisioned, half, say)
        inv(project, *READY)
        came = traffic(host) - before
        _gate(host, hub)
    shutil.rmtree(folder)
    of_lock = (provisioned - before).arrived - calm.provisioned.arrived
    twice = came.arrived - calm.ready.arrived
    share = 100 * twice / calm.ready.arrived
    say(f"  {_amounts(came)}: {formats.size(twice)} twice")
    return Result(
        id="cold-killed",
        what="downloaded twice after everything was killed at half of the bytes and at half of "
        "the model",
        ours=round(share, 1),
        other=None,
        unit="%",
        ratio=None,
        bar="<= 2 %",
        met=share <= 2,
        why="" if share <= 2 else PARTIAL_WHEELS,
        commands={"ours": KILLED},
        detail={
            "MB received before the kill": round(at / 1e6),
            "MB downloaded twice": {
                "of the environment": round(of_lock / 1e6),
                "of the model": round((twice - of_lock) / 1e6),
            },
            "MB in total": {
                "killed": round(came.arrived / 1e6),
                "undisturbed": round(calm.ready.arrived / 1e6),
            },
        },
    )


PARTIAL_WHEELS = (
    "uv unpacks a wheel while downloading it and discards incomplete ones; it downloads all "
    "large ones in parallel, so at half of the bytes hardly any is complete"
)


def _kill_when(
    host: Replica,
    project: HostProject,
    words: tuple[str, ...],
    before: Traffic,
    half: int,
    say: Say,
) -> int:
    """Run `inv`, kill all when `half` bytes have come since `before`; return how many had."""
    log = project.project.root.parent / "killed.log"
    with log.open("wb") as output:
        client = subprocess.Popen(
            [sys.executable, "-m", "invoke", *words],
            cwd=project.project.root,
            env=project.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while (came := (traffic(host) - before).arrived) < half:
            if client.poll() is not None:
                text = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise CommandFailed(f"inv {words[0]} ended before half had come:\n{text}")
            time.sleep(_TICK)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(client.pid, signal.SIGKILL)
        client.wait()
    number = kill_work(host)
    came = (traffic(host) - before).arrived
    if not number:
        raise CommandFailed(f"inv {words[0]}: nothing was at work on the host at half")
    say(f"  {words[0]}: {number} processes killed when {formats.size(came)} had come")
    return came


def _gate(host: Replica, hub: Hub) -> None:
    """Raise CommandFailed unless the environment works and the model is whole."""
    on_host(host, f"{ENVIRONMENT}/bin/llamafactory-cli version", "llamafactory-cli version")
    wanted = hashlib.sha256(hub.repos[MODEL].files[WEIGHTS]).hexdigest()
    where = f"{BASE}/.. -path '*{MODEL.replace('/', '--')}*' -name {WEIGHTS}"
    if wanted not in host.sh(f"find {where} -exec sha256sum {{}} +"):
        raise CommandFailed(f"{MODEL}: not on the host with its sha256")


def _bytes(needed: Mapping[str, int], ours: _Came, other: _Came | None) -> Result:
    whole = sum(needed.values())
    ratio = ours.ready.arrived / whole
    beside = {
        "all": round((ours.ready.arrived - whole) / 1e6, 1),
        "listings of the index, once": round(ours.lists / 1e6, 1),
        "Debian packages, a C compiler": round(ours.debian / 1e6, 1),
        "conda's Python": round(ours.ready.own / 1e6, 1),
    }
    detail: dict[str, Any] = {
        "MB needed": {name: round(size / 1e6, 1) for name, size in needed.items()},
        "MB ours": _parts(ours.ready),
        "multiples of what is needed": {"ours": round(ratio, 3)},
        "MB besides the lock and the model": beside,
    }
    if other:
        detail["MB otherwise"] = _parts(other.ready)
        detail["multiples of what is needed"]["otherwise"] = round(other.ready.arrived / whole, 3)
    return Result(
        id="cold-bytes",
        what="bytes a fresh host receives until it can train, compared with the lock's files "
        "and the model",
        ours=round(ours.ready.arrived / 1e6),
        other=round(whole / 1e6),
        unit="MB",
        ratio=round(ratio, 3),
        bar="<= 1.03x",
        met=ratio <= 1.03,
        why="" if ratio <= 1.03 else BESIDE,
        commands={
            "ours": f"inv provision --on {NAME} --flavour {FLAVOUR}\ninv train --on {NAME}",
            "other": "uv pip compile --no-deps --format pylock.toml --python-version 3.10 "
            f"configs/locks/{FLAVOUR}.txt  # the sum of these sizes and of the model's files",
            "the tutorial": (TUTORIAL + DOWNLOAD.format(endpoint="HUB", model=MODEL)).strip(),
        },
        detail=detail,
    )


BESIDE = (
    "the package index used here sends its listings uncompressed (gzip would reduce them to a "
    "quarter); a C compiler is installed for kernels that are compiled at run time; the rest is "
    "uv (18 MB), conda's Python, Debian's package lists and TLS"
)


def _parts(came: Traffic) -> dict[str, float]:
    return {
        "through its network link": round(came.received / 1e6, 1),
        "the same with headers": round(came.frames / 1e6, 1),
        "from its own conda channel": round(came.own / 1e6, 1),
    }


def _amounts(came: Traffic) -> str:
    return f"{came.arrived / 1e6:,.1f} MB ({came.own / 1e6:.1f} MB of its own channel)"
