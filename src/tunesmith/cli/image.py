"""The verbs on images."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import FLAVOUR, MIRROR

if TYPE_CHECKING:
    from tunesmith.project import Project

_ROWS = 20  # the largest packages that `image.sizes` shows


@command(
    "image.build",
    example="inv image.build --flavour cu128 --mirror cn",
    help={
        "flavour": FLAVOUR,
        "mirror": MIRROR,
        "base": "base image with Python 3.10 (default: $BASE_IMAGE, else the stack's)",
        "toolkit": "include nvcc of the flavour's CUDA",
    },
)
def build(
    session: Session,
    flavour: str = "",
    mirror: str = "default",
    base: str = "",
    toolkit: bool = False,
) -> None:
    """Build the image of a flavour."""
    from tunesmith.cli.console import console, say
    from tunesmith.core import formats
    from tunesmith.core.progress import Display
    from tunesmith.image import build as building
    from tunesmith.image import engine

    project = session.project
    profile = project.mirror(mirror)
    start = base or os.environ.get("BASE_IMAGE")
    plan = building.plan_build(project, flavour or None, profile, start, toolkit=toolkit)
    if session.dry:
        say(plan.render())
        return
    began = time.monotonic()
    log = project.folder("image") / "build.log"
    with Display(console) as display:
        row = display.row(plan.tag)
        image_id = building.build(plan, log, lambda step: row.doing(f"{plan.tag}: {step}"))
    size = engine.find_image(engine.connect(), plan.tag).attrs["Size"]
    took = formats.duration(time.monotonic() - began)
    say(f"image {plan.tag} ({image_id[7:19]}, {formats.size(size)} unpacked) in {took}")


@command("image.verify", example="inv image.verify", help={"flavour": FLAVOUR})
def verify(session: Session, flavour: str = "") -> None:
    """Test that an image keeps its promises."""
    from tunesmith.cli.console import moving, say
    from tunesmith.core.errors import TunesmithError
    from tunesmith.image import engine, measure
    from tunesmith.image import verify as verifying

    project = session.project
    name = _tag(project, flavour)
    client = engine.connect()
    with moving(f"{name}: measuring"):
        old = measure.drift(measure.measure(client, name), _labels(project, flavour))
    if old:
        raise TunesmithError(f"{name}: {old[0]}", old[1:])
    with moving(f"{name}: testing its promises"):
        verified = verifying.verify(project, client, name)
    for promise in verified.promises:
        why = f" ({promise.why})" if promise.why else ""
        say(f"{promise.outcome:<8} {promise.text}{why}")
    held, count = verified.count("passed"), len(verified.promises)
    say(f"{name}: {held} of {count} promises hold, {verified.count('skipped')} were skipped")
    if not verified.good:
        raise TunesmithError(
            f"{name}: {verified.count('failed')} promises do not hold",
            hint="`inv image.build` builds the image again",
        )


@command("image.tags", example="inv image.tags", help={"flavour": FLAVOUR})
def tags(session: Session, flavour: str = "") -> None:
    """Print the tags of an image, measured inside it."""
    from tunesmith.cli.console import say
    from tunesmith.image import engine, measure

    name = _tag(session.project, flavour)
    for tag in measure.tags(measure.measure(engine.connect(), name)):
        say(f"{engine.REPOSITORY}:{tag}")


@command("image.sizes", example="inv image.sizes", help={"flavour": FLAVOUR})
def sizes(session: Session, flavour: str = "") -> None:
    """Print the largest layers and packages of an image."""
    from rich.table import Table

    from tunesmith.cli.console import console
    from tunesmith.core import formats
    from tunesmith.image import engine, measure

    name = _tag(session.project, flavour)
    client = engine.connect()
    image = engine.find_image(client, name)
    table = Table("bytes", "part", box=None, pad_edge=False)
    table.add_row(formats.size(image.attrs["Size"]), f"{name}, unpacked")
    for layer in image.history():
        if layer["Size"] > 100_000:
            line = " ".join(str(layer["CreatedBy"]).split())
            what = line.partition("# buildkit")[0].rpartition("sh /")[2] or line[:60]
            table.add_row(formats.size(layer["Size"]), f"layer: {what.strip()[:80]}")
    for part, size in list(measure.sizes(client, name).items())[:_ROWS]:
        table.add_row(formats.size(size), f"site-packages/{part}")
    console.print(table)


@command(
    "image.sbom",
    example="inv image.sbom --output sbom.json",
    help={"flavour": FLAVOUR, "output": "file (default: stdout)"},
)
def sbom(session: Session, flavour: str = "", output: str = "") -> None:
    """Write an image's bill of materials (CycloneDX)."""
    from tunesmith.cli.console import say, write
    from tunesmith.core.files import write_text
    from tunesmith.image import engine, measure

    name = _tag(session.project, flavour)
    found = measure.measure(engine.connect(), name)
    text = measure.sbom(found, name)
    if not output:
        write(text)
        return
    path = Path(output).expanduser()
    write_text(path, text)
    say(f"{path}: {len(found.packages)} Python and {len(found.system)} system packages of {name}")


@command(
    "image.push",
    example="inv image.push --to registry.example.com/lab/tunesmith",
    help={"to": "registry and repository", "flavour": FLAVOUR},
)
def push(session: Session, to: str, flavour: str = "") -> None:
    """Push an image to a registry under its measured tags."""
    from tunesmith.cli.console import moving, say
    from tunesmith.image import engine, measure
    from tunesmith.image import push as pushing

    name = _tag(session.project, flavour)
    client = engine.connect()
    names = measure.tags(measure.measure(client, name))
    if session.dry:
        for tag in names:
            say(f"would push {name} as {to}:{tag}")
        return
    for tag, digest in pushing.push(client, name, to, names, say, moving):
        say(f"{to}:{tag}@{digest}")


@command(
    "image.ship",
    example="inv image.ship --on gpu1",
    help={"on": "a host with Docker", "flavour": FLAVOUR},
)
def ship(session: Session, on: str, flavour: str = "") -> None:
    """Send an image to a host over SSH."""
    from tunesmith.cli.console import moving, say
    from tunesmith.core.errors import UsageError
    from tunesmith.hosts.remote import Remote
    from tunesmith.image import engine
    from tunesmith.image import ship as shipping

    if "," in on:
        raise UsageError(f"--on {on}: one host at a time", hint="`inv host.list` shows them")
    project = session.project
    remote = Remote(on, project.inventory)
    name = _tag(project, flavour)
    client = engine.connect()
    image = engine.find_image(client, name)
    if session.dry:
        far = shipping.look(remote)
        layers = image.attrs["RootFS"]["Layers"]
        missing = 0 if far.has(str(image.id)) else len(layers) - far.shared(layers)
        say(f"would send {missing} of {len(layers)} layers of {name} to {on}")
        return
    shipping.ship(client, name, remote, project.folder("image") / on, say, moving)


@command(
    "image.prune",
    example="inv --dry image.prune",
    help={"everything": "also images that still have a name"},
)
def prune(session: Session, everything: bool = False) -> None:
    """Remove replaced images and the build cache."""
    from tunesmith.cli.console import say
    from tunesmith.core import formats
    from tunesmith.image import engine
    from tunesmith.image import prune as pruning

    client = engine.connect()
    verb = "would remove" if session.dry else "removing"
    for image in pruning.replaced(client, everything=everything):
        names = ", ".join(image.tags) or "replaced by a newer build"
        size = formats.size(image.attrs["Size"])
        say(f"{verb} {str(image.id)[7:19]} ({size}, {names})")
        if not session.dry:
            pruning.remove(client, image)
    if session.dry:
        say("would empty the builder's cache")
        return
    say(f"the builder's cache: {formats.size(pruning.empty_cache(client))} freed")


def _tag(project: Project, flavour: str) -> str:
    from tunesmith.image import engine

    return engine.tag_of(project.stack.flavour(flavour or None))


def _labels(project: Project, flavour: str) -> dict[str, str]:
    """Return the labels an image built of this clone has."""
    from tunesmith.core.files import sha256_of
    from tunesmith.image import engine
    from tunesmith.stack.sources import image_digest

    return {
        engine.STACK: sha256_of(project.stack.path),
        engine.LOCK: project.stack.flavour(flavour or None).lock_sha256,
        engine.SOURCES: image_digest(project.root),
    }
