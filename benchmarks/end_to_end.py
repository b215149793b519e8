"""From "SSH works" to the merged model on the user's disk, through lines like rented ones.

Two fresh replicas, one a side, each with 1 Gbit/s towards the host and 100 Mbit/s back to the user
(the kernel's token bucket on the replica's interface). Ours: `inv host.add`, `inv provision`,
`inv train`, `inv pull --merge-here`, which brings the adapter and merges it on the user's side; the
base model is fetched there by `inv model.fetch` while the host is provisioned. The other side is a
script of the tutorial's steps: environment, download of the model, the data set's entry,
`llamafactory-cli train`, `llamafactory-cli export` (bfloat16, else it writes twice the bytes), scp.
Both train the same config: rows, steps, batch, seed.

Then, on the same run, what `--then merge,pull` does: merge and proof on the host, the merged model
back. That is a row of its own, and the gate: its weights have the sha256 of the tutorial's; where
the adapters differ in a last bit, the same tensors and shapes, and losses within 1 %. The model
that was merged on the user's side may differ from the host's by a bfloat16's last place in one
element of 10,000: NumPy sums in another order.

PyPI is the real one, the base model comes from a hub of this machine through the same line.
Needs root and Docker.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.cold import (
    DOWNLOAD,
    MODEL,
    WEIGHTS,
    add_words,
    download_script,
    inv,
    lead_here,
    on_host,
    prepared,
    project_of,
    provision_words,
    send_versions,
)
from benchmarks.harness import ROOT, CommandFailed, Result
from benchmarks.provision import FLAVOUR, NAME, TUTORIAL
from hubserver import Hub
from replica.build import Images
from replica.network import shape, traffic
from replica.replica import Options, Replica, running
from replica_fixtures import HostProject
from tunesmith.core.files import sha256_of

BAR = 3.0
TO_HOST, FROM_HOST = "1gbit", "100mbit"
STEPS = 8
RUN = "whole"
DISK = "/root/autodl-tmp"
CONFIG = ROOT / "configs" / "train" / "smollm2_135m_lora_sft.yaml"
# The demo's config, short.
CHANGES: Mapping[str, Any] = {
    "model_name_or_path": MODEL,
    "max_steps": STEPS,
    "save_steps": STEPS,
    "eval_strategy": "no",
    "val_size": 0,
}
EXPORT: Mapping[str, Any] = {
    "model_name_or_path": f"{DISK}/model",
    "adapter_name_or_path": f"{DISK}/saves",
    "template": "smollm",
    "infer_dtype": "bfloat16",
    "export_dir": f"{DISK}/merged",
    "export_size": 5,
    "export_device": "cpu",
    "export_legacy_format": False,
}
ACTIVATE = """
set -e
. /root/miniconda3/etc/profile.d/conda.sh
conda activate tutorial
export HF_HUB_OFFLINE=1
cd /root/autodl-tmp
"""
TRAIN, MERGE = "llamafactory-cli train train.yaml", "llamafactory-cli export export.yaml"
SCP = "scp -r HOST:/root/autodl-tmp/merged ."
# What both sides come by, the order of the plot.
STAGES = ("environment", "base model", "trained", "merged on the user's disk")
# Of the user's line, bytes a second.
BACK = 100e6 / 8
Say = Callable[[str], None]


def run(work: Path, say: Say) -> list[Result]:
    """Measure each side once, on a fresh host of its own."""
    with prepared(say) as (images, hub):
        say(f"A: the tutorial's steps, {TO_HOST} there, {FROM_HOST} back")
        other = _other(images, hub, work / "other", say)
        say("B: inv host.add, provision, train, pull --merge-here; then merge, pull")
        adapter, whole, odd = _ours(images, hub, work / "ours", say)
    gate = agree(whole, other)
    detail = {
        "our seconds": adapter.rounded(),
        "seconds of the alternative": other.rounded(),
        "MB back to the user": {
            "ours": round(adapter.back / 1e6, 1),
            "otherwise": round(other.back / 1e6, 1),
        },
        "elements of the weights that differ from the host's merge": odd,
        "note": "one run per side, on two fresh hosts; at 100 Mbit/s the user downloads the "
        f"base model in {hub_bytes(hub) / BACK:.0f} s while the host is provisioned",
        "plots": [
            {
                "title": ", ".join(f"{n} {stage}" for n, stage in enumerate(STAGES, 1)),
                "x": "seconds since SSH works",
                "y": "what is reached",
                "lines": {"ours": adapter.stages(), "otherwise": other.stages()},
            }
        ],
    }
    more = {
        "gate": gate,
        "our seconds": whole.rounded(),
        "MB back to the user": {
            "ours": round(whole.back / 1e6, 1),
            "otherwise": round(other.back / 1e6, 1),
        },
        "note": "the run of the row above, after its training",
    }
    line = "links of 1 Gbit/s and 100 Mbit/s"
    what = f"from working SSH to the merged model on the user's disk, {line}"
    whole_run = (
        "the same with --then merge,pull: merged and proven on the host, everything downloaded"
    )
    return [
        _row("end-to-end", what, adapter, other, _commands(HERE), detail),
        _row("end-to-end-host", whole_run, whole, other, _commands(THERE), more),
    ]


def _row(
    name: str,
    what: str,
    ours: Way,
    other: Way,
    commands: Mapping[str, str],
    detail: Mapping[str, Any],
) -> Result:
    ratio = other.wall / ours.wall
    return Result(
        id=name,
        what=what,
        ours=round(ours.wall, 1),
        other=round(other.wall, 1),
        unit="s",
        ratio=round(ratio, 2),
        bar=f">= {BAR:g}x",
        met=ratio >= BAR,
        why="" if ratio >= BAR else _why(ours),
        commands=commands,
        detail=detail,
    )


def _why(ours: Way) -> str:
    share = ours.reached[STAGES[0]] / ours.wall
    return (
        f"{share:.0%} of our time is the environment: its 4.4 GB fill the link for 37 s on either "
        "side; the rest is unpacking and compiling 8 GB on two cores"
    )


def hub_bytes(hub: Hub) -> int:
    """Return the size of the base model."""
    return sum(map(len, hub.repos[MODEL].files.values()))


@dataclass
class Way:
    """One side's way: the seconds of each step in order, the result, and what came back."""

    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    merged: Path = Path()
    losses: Sequence[float] = ()
    back: int = 0

    @property
    def wall(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds.values())

    def step(self, name: str, stage: str, seconds: float) -> None:
        """Note a step, and the stage that is reached with it, if any."""
        self.seconds[name] = seconds
        if stage:
            self.reached[stage] = self.wall

    def rounded(self) -> dict[str, float]:
        """Return the seconds of the steps for the page."""
        return {name: round(seconds, 1) for name, seconds in self.seconds.items()}

    def stages(self) -> list[list[float]]:
        """Return (seconds, number of stages) for the plot."""
        return [[0, 0], *([round(self.reached[s], 1), n] for n, s in enumerate(STAGES, 1))]


def agree(ours: Way, other: Way) -> str:
    """Return in words how far both results are the same. Raises CommandFailed if they differ.

    Differ: other tensors or shapes, or a loss more than 1 % away.
    """
    files = [way.merged / WEIGHTS for way in (ours, other)]
    if len({sha256_of(file) for file in files}) == 1:
        return "the merged weights have the same sha256"
    shapes = [shapes_of(file) for file in files]
    if shapes[0] != shapes[1]:
        raise CommandFailed("the merged models have other tensors or shapes")
    if not ours.losses or len(ours.losses) != len(other.losses):
        raise CommandFailed(f"{len(ours.losses)} steps against {len(other.losses)}")
    pairs = zip(ours.losses, other.losses, strict=True)
    gap = max(abs(one - two) / abs(two) for one, two in pairs)
    if gap > 0.01:
        raise CommandFailed(f"the losses of a step differ by {gap:.1%}")
    return (
        f"the same tensors and shapes, losses of all {len(ours.losses)} steps within {gap:.2%} "
        "(the weights differ: the adapters were trained on two hosts)"
    )


def shapes_of(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]))
        for name, tensor in header.items()
        if name != "__metadata__"
    }


# --- ours ----------------------------------------------------------------------------------


def _ours(images: Images, hub: Hub, folder: Path, say: Say) -> tuple[Way, Way, str]:
    """Return the way with the merge here, the one with the merge there, and how they differ."""
    way = Way()
    with running(images, Options("autodl")) as host, Hub() as near:
        near.repos = hub.repos
        shape(host, TO_HOST, FROM_HOST)
        project = project_of(images, folder, host, hub)
        fetching = _fetch_here(project, near)
        way.step("host.add", "", _timed(lambda: inv(project, *add_words(project, host))))
        seconds = _timed(lambda: inv(project, *provision_words(project)))
        way.step("provision", STAGES[0], seconds)
        say(f"  provision: {seconds:.1f} s")
        before = traffic(host)
        _train(project, way, say)
        if fetching.wait():
            raise CommandFailed(f"inv model.fetch: exit code {fetching.returncode}")
        # Its line is not shaped here: if it were not there by now, it would have to be waited for.
        way.step("wait for the base model", "", max(0.0, hub_bytes(hub) / BACK - way.wall))
        whole = replace(way, seconds=dict(way.seconds), reached=dict(way.reached))
        trained = traffic(host)
        _stage(way, project, HERE[-1], "pull and merge here", say)
        way.back = (traffic(host) - before).sent
        merged = project.project.runs / RUN / "merged"
        way.merged = merged.rename(folder / "here")
        after = traffic(host)
        whole.step("merge and proof", "", _timed(lambda: inv(project, *THERE[-2])))
        say(f"  merge and proof: {whole.seconds['merge and proof']:.1f} s")
        _stage(whole, project, THERE[-1], "pull", say)
        whole.back = (trained - before).sent + (traffic(host) - after).sent
        whole.merged = merged
        events = (merged.parent / "events.jsonl").read_text(encoding="utf-8")
        whole.losses = losses_of(events)
    return way, whole, differing(way.merged / WEIGHTS, whole.merged / WEIGHTS)


def _stage(way: Way, project: HostProject, words: Sequence[str], name: str, say: Say) -> None:
    way.step(name, STAGES[-1], _timed(lambda: inv(project, *words)))
    say(f"  {name}: {way.seconds[name]:.1f} s")


def _fetch_here(project: HostProject, near: Hub) -> subprocess.Popen[bytes]:
    """Start bringing the base model to the user's machine."""
    mirror = project.mirror.with_name("near.yml")
    content = yaml.safe_load(project.mirror.read_text(encoding="utf-8"))
    mirror.write_text(yaml.safe_dump(content | {"hf_endpoints": [near.url]}), encoding="utf-8")
    with mirror.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "invoke", "model.fetch", MODEL, "--mirror", str(mirror)],
            cwd=project.project.root,
            env=project.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def differing(one: Path, two: Path) -> str:
    """Return in words how many elements of two bfloat16 models differ. Raises CommandFailed.

    More than one of 10,000, or by more than a last place: then they are not the same model.
    """
    if shapes_of(one) != shapes_of(two):
        raise CommandFailed(f"{one} and {two}: other tensors or shapes")
    apart, number = 0, 0
    for name in shapes_of(one):
        pair = [_bits(file, name) for file in (one, two)]
        gaps = np.abs(pair[0] - pair[1])
        apart, number = apart + int(np.count_nonzero(gaps)), number + gaps.size
        if gaps.max(initial=0) > 1:
            raise CommandFailed(f"{name}: an element differs by {gaps.max()} last places")
    if apart * 10_000 > number:
        raise CommandFailed(f"{apart} of {number} elements differ")
    return f"{apart:,} of {number:,}, by the last place"


def _bits(file: Path, name: str) -> NDArray[np.int32]:
    """Return a bfloat16 tensor as numbers whose distance counts last places."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        start, end = json.loads(stream.read(size))[name]["data_offsets"]
    flat = np.fromfile(file, np.uint16, (end - start) // 2, offset=8 + size + start)
    bits = flat.astype(np.int32)
    return np.where(bits >= 0x8000, 0x8000 - bits, bits)


# The words of `inv` after the host is provisioned, by both ways.
TRAINING = ("train", "--on", NAME, "--run", RUN, "--no-evaluate")
TRAINING += tuple(f"{key}={json.dumps(value)}" for key, value in CHANGES.items())
HERE = (TRAINING, ("pull", "--on", NAME, "--run", RUN, "--merge-here"))
THERE = (
    TRAINING,
    ("merge", "--on", NAME, "--run", RUN),
    ("pull", "--on", NAME, "--run", RUN),
)
# A line that ends a step, the step, the stage.
_ENDS = (
    (r"^fetch: succeeded", "upload and download of the model", STAGES[1]),
    (r"^train: succeeded", "train", STAGES[2]),
)


def _train(project: HostProject, way: Way, say: Say) -> None:
    """Train; note the steps as they are told."""
    began = time.monotonic()
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "invoke", *TRAINING],
        cwd=project.project.root,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as client:
        assert client.stdout is not None
        for line in client.stdout:
            said.append(line)
            for pattern, name, stage in _ENDS:
                if re.match(pattern, line):
                    now = time.monotonic()
                    way.step(name, stage, now - began)
                    say(f"  {name}: {now - began:.1f} s")
                    began = now
    text = "".join(said)
    if client.returncode or len(way.reached) != 3:
        raise CommandFailed(f"inv train:\n{text[-3000:]}")
    way.step("end of the run", "", time.monotonic() - began)


# --- the tutorial --------------------------------------------------------------------------


def _other(images: Images, hub: Hub, folder: Path, say: Say) -> Way:
    way = Way()
    folder.mkdir()
    with running(images, Options("autodl")) as host:
        shape(host, TO_HOST, FROM_HOST)
        lead_here(host, hub.port)
        download = ACTIVATE.replace("export HF_HUB_OFFLINE=1", "") + download_script(hub)
        steps: tuple[tuple[str, str, Callable[[], object]], ...] = (
            ("conda and pip", STAGES[0], lambda: _environment(host)),
            ("download of the model", STAGES[1], lambda: on_host(host, download, "download")),
            ("data set and configs", "", lambda: _send(host, _files())),
            ("train", STAGES[2], lambda: on_host(host, ACTIVATE + TRAIN, TRAIN)),
            ("export", "", lambda: on_host(host, ACTIVATE + MERGE, MERGE)),
            ("scp", STAGES[-1], lambda: _scp(host, folder)),
        )
        before = traffic(host)
        for name, stage, work in steps:
            if name == "data set and configs":
                before = traffic(host)
            way.step(name, stage, _timed(work))
            say(f"  {name}: {way.seconds[name]:.1f} s")
        way.back = (traffic(host) - before).sent
        way.losses = losses_of(on_host(host, f"cat {DISK}/saves/trainer_log.jsonl", "losses"))
    way.merged = folder / "merged"
    return way


def _environment(host: Replica) -> None:
    send_versions(host)
    on_host(host, TUTORIAL, "conda and pip")


def _files() -> dict[str, str]:
    """Return what the tutorial's user writes on the host: the data set, its entry, two configs."""
    data = ROOT / "data"
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config |= {**CHANGES, "model_name_or_path": f"{DISK}/model"}
    config |= {"dataset_dir": f"{DISK}/data", "output_dir": f"{DISK}/saves"}
    return {
        "data/philosophy_data.json": (data / "philosophy_data.json").read_text(encoding="utf-8"),
        "data/dataset_info.json": (data / "dataset_info.json").read_text(encoding="utf-8"),
        "train.yaml": yaml.safe_dump(config, allow_unicode=True),
        "export.yaml": yaml.safe_dump(dict(EXPORT)),
    }


def _send(host: Replica, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = f"{DISK}/{name}"
        done = host.ssh(f"mkdir -p $(dirname {path}) && cat >{path}", text=text)
        if done.returncode != 0:
            raise CommandFailed(f"{name}: {done.stderr.strip()}")


def _scp(host: Replica, folder: Path) -> None:
    argv = ["scp", "-q", "-r", "-F", "none", "-i", str(host.key), "-P", str(host.port)]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    argv += ["-o", "LogLevel=ERROR", f"{host.user}@127.0.0.1:{DISK}/merged", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandFailed(f"scp: {done.stderr.strip()}")


def losses_of(log: str) -> list[float]:
    """Return the loss of each step, of LLaMA-Factory's trainer_log.jsonl or our events.jsonl."""
    rows = [json.loads(line) for line in log.splitlines() if line.strip()]
    steps = [row for row in rows if row.get("event", "log") == "log"]
    return [float(row["loss"]) for row in steps if row.get("loss") is not None]


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _commands(ours: Sequence[Sequence[str]]) -> dict[str, str]:
    first = [
        f'inv host.add {NAME} "ssh -p PORT root@HOST"',
        f"inv provision --on {NAME} --flavour {FLAVOUR}  # beside it: inv model.fetch {MODEL}",
    ]
    other = [
        (TUTORIAL + DOWNLOAD.format(endpoint="HUB", model=MODEL)).strip(),
        "# the data set's file and entry in data/, train.yaml: the same config",
        TRAIN,
        f"{MERGE}  # infer_dtype: bfloat16, export_device: cpu",
        SCP,
    ]
    return {
        "ours": "\n".join([*first, *(f"inv {' '.join(words)}" for words in ours)]),
        "other": "\n".join(other),
    }
