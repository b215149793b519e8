"""What tasks.py calls for the verbs on images: do it, and print the outcome."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.table import Table

from tunesmith.cli.console import console, say, write
from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of, write_text
from tunesmith.core.mirrors import load_mirror
from tunesmith.image import build, engine, measure, prune, push, ship, verify
from tunesmith.project import Project
from tunesmith.stack.sources import image_digest


def image_build(
    root: Path, flavour: str | None, *, mirror: str, base: str | None, toolkit: bool, dry: bool
) -> None:
    """Build the image of a flavour; the docker command shows its progress."""
    project = Project.at(root)
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    base = base or os.environ.get("BASE_IMAGE")
    plan = build.plan_build(project, flavour, profile, base, toolkit=toolkit)
    if dry:
        say(plan.render())
        return
    began = time.monotonic()
    image_id = build.build(plan)
    size = engine.find_image(engine.connect(), plan.tag).attrs["Size"]
    took = formats.duration(time.monotonic() - began)
    say(f"image {plan.tag} ({image_id[7:19]}, {formats.size(size)} unpacked) in {took}")


def image_verify(root: Path, flavour: str | None) -> None:
    """Print each promise and whether it holds. Raises TunesmithError when one does not."""
    project = Project.at(root)
    name = engine.tag_of(project.stack.flavour(flavour))
    client = engine.connect()
    old = measure.drift(measure.measure(client, name), _wanted(project, flavour))
    if old:
        raise TunesmithError(f"{name}: {old[0]}", old[1:])
    verified = verify.verify(project, client, name)
    for promise in verified.promises:
        why = f" ({promise.why})" if promise.why else ""
        say(f"{promise.outcome:<8} {promise.text}{why}")
    held, count = verified.count("passed"), len(verified.promises)
    say(f"{name}: {held} of {count} promises hold, {verified.count('skipped')} were skipped")
    if not verified.good:
        raise TunesmithError(
            f"{name}: {verified.count('failed')} promises do not hold; `inv image.build` makes it "
            "anew"
        )


def image_tags(root: Path, flavour: str | None) -> None:
    """Print the tags an image gets elsewhere, measured from it."""
    project = Project.at(root)
    name = engine.tag_of(project.stack.flavour(flavour))
    for tag in measure.tags(measure.measure(engine.connect(), name)):
        say(f"{engine.REPOSITORY}:{tag}")


def image_sizes(root: Path, flavour: str | None, rows: int = 20) -> None:
    """Print an image's layers, and the largest parts of its environment."""
    project = Project.at(root)
    name = engine.tag_of(project.stack.flavour(flavour))
    client = engine.connect()
    image = engine.find_image(client, name)
    table = Table("bytes", "part", box=None, pad_edge=False)
    table.add_row(formats.size(image.attrs["Size"]), f"{name}, unpacked")
    for layer in image.history():
        if layer["Size"] > 100_000:
            command = " ".join(str(layer["CreatedBy"]).split())
            what = command.partition("# buildkit")[0].rpartition("sh /")[2] or command[:60]
            table.add_row(formats.size(layer["Size"]), f"layer: {what.strip()[:80]}")
    for part, size in list(measure.sizes(client, name).items())[:rows]:
        table.add_row(formats.size(size), f"site-packages/{part}")
    console.print(table)


def image_sbom(root: Path, flavour: str | None, output: str) -> None:
    """Write what an image holds as CycloneDX JSON, to a file or to stdout."""
    project = Project.at(root)
    name = engine.tag_of(project.stack.flavour(flavour))
    found = measure.measure(engine.connect(), name)
    text = measure.sbom(found, name)
    if not output:
        write(text)
        return
    path = Path(output).expanduser()
    write_text(path, text)
    say(f"{path}: {len(found.packages)} Python and {len(found.system)} system packages of {name}")


def image_push(root: Path, flavour: str | None, to: str, *, dry: bool) -> None:
    """Push an image under its measured tags."""
    project = Project.at(root)
    name = engine.tag_of(project.stack.flavour(flavour))
    client = engine.connect()
    tags = measure.tags(measure.measure(client, name))
    if dry:
        for tag in tags:
            say(f"would push {name} as {to}:{tag}")
        return
    for tag, digest in push.push(client, name, to, tags, say):
        say(f"{to}:{tag}@{digest}")


def image_ship(root: Path, on: str, flavour: str | None, *, dry: bool) -> None:
    """Bring an image into a host's Docker over SSH."""
    from tunesmith.hosts.remote import Remote

    if "," in on:
        raise UsageError(f"{on!r}: one host at a time; `inv host.list` shows them")
    project = Project.at(root)
    remote = Remote(on, project.inventory)
    name = engine.tag_of(project.stack.flavour(flavour))
    client = engine.connect()
    image = engine.find_image(client, name)
    if dry:
        far = ship.look(remote)
        layers = image.attrs["RootFS"]["Layers"]
        missing = 0 if far.has(str(image.id)) else len(layers) - far.shared(layers)
        say(f"would send {missing} of {len(layers)} layers of {name} to {on}")
        return
    ship.ship(client, name, remote, project.folder("image") / on, say)


def image_prune(root: Path, *, everything: bool, dry: bool) -> None:
    """Remove images that a newer build replaced, and what building left behind."""
    Project.at(root)
    client = engine.connect()
    for image in prune.replaced(client, everything=everything):
        names = ", ".join(image.tags) or "replaced by a newer build"
        size = formats.size(image.attrs["Size"])
        say(f"{'would remove' if dry else 'removing'} {str(image.id)[7:19]} ({size}, {names})")
        if not dry:
            prune.remove(client, image)
    if dry:
        say("would empty the builder's cache")
        return
    say(f"the builder's cache: {formats.size(prune.empty_cache(client))} freed")


def _wanted(project: Project, flavour: str | None) -> dict[str, str]:
    return {
        engine.STACK: sha256_of(project.stack.path),
        engine.LOCK: project.stack.flavour(flavour).lock_sha256,
        engine.SOURCES: image_digest(project.root),
    }
