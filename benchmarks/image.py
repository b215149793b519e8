"""The image: its size on disk and as zstd, and building it again.

The base is the one of configs/stack.yml, or BASE_IMAGE, or, where no registry can be reached,
the stand-in of the tests; it is a few percent of the image. The bar counts from the lock's
unpacked size, which is in configs/stack.yml.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.harness import ROOT, CommandFailed, Measured, Result, measure
from image.base import build_base
from replica.build import BUNDLE
from replica.engine import NEEDS, NoEngine, start_engine
from tunesmith import docker_engine
from tunesmith.project import Project

SPARE = 350_000_000  # bytes beside the lock's own
BUILD = "inv image.build"
Say = Callable[[str], None]


def run(work: Path, say: Say) -> list[Result]:
    """Build, build again without a change and with one, and pack."""
    try:
        engine = start_engine()
    except NoEngine as missing:
        raise CommandFailed(f"{missing}; `{NEEDS}`, as root") from None
    try:
        return _measured(work, say)
    finally:
        engine.stop()


def _measured(work: Path, say: Say) -> list[Result]:
    subprocess.run(["git", "clone", "--quiet", ROOT, work / "clone"], check=True)
    project = Project.at(work / "clone")
    flavour = project.stack.flavour()
    name = docker_engine.tag_of(flavour)
    client = docker_engine.connect()
    argv = [Path(sys.executable).with_name("inv"), "image.build", "--mirror", _mirror(work)]
    env = {**os.environ, "BASE_IMAGE": os.environ.get("BASE_IMAGE") or build_base()}

    def build() -> Measured:
        return measure(argv, work / "log", env=env, cwd=project.root)

    def image() -> dict[str, Any]:
        return dict(client.images.get(name).attrs)

    say(f"  first build: {build().wall:.1f} s")
    same, changed, bytes_changed, layers = [], [], 0, 0
    source = project.root / "src/tunesmith/__init__.py"
    for turn in range(3):
        before = image()
        same.append(build().wall)
        if image()["RootFS"] != before["RootFS"]:
            raise CommandFailed("a build without a change made another image")
        with source.open("a", encoding="utf-8") as file:
            file.write(f"# change {turn}\n")
        changed.append(build().wall)
        old, new = before["RootFS"]["Layers"], image()["RootFS"]["Layers"]
        layers = sum(a != b for a, b in zip(old, new, strict=True))
        bytes_changed = _newest_layers(client, name, layers)
        say(f"  again: {same[-1]:.1f} s, after a change: {changed[-1]:.1f} s, {layers} layers")
    size, packed = int(image()["Size"]), _packed(name)
    allowed = flavour.size_bytes + SPARE
    half = size / 2
    return [
        Result(
            "image-size",
            f"image {name}, unpacked",
            round(size / 1e9, 2),
            None,
            "GB",
            None,
            f"<= {allowed / 1e9:.2f} GB, the lock's size and 0.35",
            size <= allowed,
            commands={"ours": BUILD},
        ),
        Result(
            "image-zstd",
            f"image {name} as zstd -3",
            round(packed / 1e9, 2),
            None,
            "GB",
            None,
            f"<= {half / 1e9:.2f} GB, half of it",
            packed <= half,
            commands={"ours": f"docker save {name} | zstd -3 | wc -c"},
        ),
        Result(
            "image-rebuild",
            "building again after a one-line change in src/",
            round(median(changed), 1),
            None,
            "s",
            None,
            "<= 5 s",
            median(changed) <= 5,
            commands={"ours": BUILD},
            detail={"layers changed": layers, "without a change, s": round(median(same), 1)},
        ),
        Result(
            "image-rebuild-bytes",
            "what a one-line change in src/ changes of the image",
            round(bytes_changed / 1e6, 2),
            None,
            "MB",
            None,
            "<= 1 MB",
            bytes_changed <= 1_000_000,
            why="" if bytes_changed <= 1_000_000 else "the last layer holds all of our sources",
            commands={"ours": BUILD},
        ),
    ]


def _newest_layers(client: Any, name: str, count: int) -> int:
    """Return the bytes of an image's last `count` layers that hold files."""
    sizes = [int(layer["Size"]) for layer in client.images.get(name).history()]
    return sum([size for size in sizes if size][:count])


def _packed(name: str) -> int:
    with subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE) as save:
        zstd = subprocess.Popen(
            ["zstd", "-3", "-T0", "-q", "-c"], stdin=save.stdout, stdout=subprocess.PIPE
        )
        assert zstd.stdout is not None
        size = 0
        while block := zstd.stdout.read(1 << 20):
            size += len(block)
        if zstd.wait():
            raise CommandFailed("zstd failed")
    if save.returncode:
        raise CommandFailed("docker save failed")
    return size


def _mirror(work: Path) -> Path:
    """Return a mirror file with the certificates of this machine, where it has its own."""
    content = yaml.safe_load((ROOT / "configs/mirrors/default.yml").read_text(encoding="utf-8"))
    if BUNDLE.is_file():
        content["ca_bundle"] = str(BUNDLE)
    file = work / "here.yml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file
