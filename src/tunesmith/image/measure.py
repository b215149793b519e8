"""Versions, packages and sizes, measured inside an image."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker

from tunesmith.core import isolated
from tunesmith.core.errors import TunesmithError
from tunesmith.image import engine

_PROBE = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Package:
    """An installed package; `licence` as written by its author, truncated to one line."""

    name: str
    version: str
    licence: str | None = None


@dataclass(frozen=True)
class Measured:
    """The content of an image. `system` lists (name, version, architecture) of dpkg's packages."""

    image_id: str
    labels: Mapping[str, str]
    python: str
    cuda: str | None
    packages: tuple[Package, ...]
    system: tuple[tuple[str, str, str], ...]
    os: tuple[str, str]

    def version(self, name: str) -> str:
        """Return a package's version. Raises TunesmithError if the image lacks it."""
        for package in self.packages:
            if package.name.lower() == name:
                return package.version
        raise TunesmithError(f"the image has no {name}", hint="rebuild it with `inv image.build`")


def measure(client: docker.DockerClient, name: str) -> Measured:
    """Measure an image's content. Raises UsageError if it does not exist."""
    image = engine.find_image(client, name)
    answer = json.loads(engine.run_in(client, name, isolated.code("python", _PROBE)))
    return Measured(
        image_id=str(image.id),
        labels=dict(image.labels),
        python=answer["python"],
        cuda=answer["cuda"],
        packages=tuple(
            sorted(
                (Package(n, v, _line(licence)) for n, v, licence in answer["packages"]), key=_key
            )
        ),
        system=tuple((n, v, a) for n, v, a in answer["system"]),
        os=(answer["os"][0], answer["os"][1]),
    )


def sizes(client: docker.DockerClient, name: str) -> dict[str, int]:
    """Return the bytes of each folder of site-packages, largest first."""
    argv = isolated.code("python", _PROBE, "sizes")
    answer: dict[str, int] = json.loads(engine.run_in(client, name, argv))
    return dict(sorted(answer.items(), key=lambda item: -item[1]))


def tags(measured: Measured) -> tuple[str, ...]:
    """Return an image's registry tags, the most specific first.

    They are made from the measured content, so that a tag cannot be wrong.
    """
    python = ".".join(measured.python.split(".")[:2])
    cuda = f"cu{measured.cuda.replace('.', '')}" if measured.cuda else "cpu"
    what = f"py{python}-{cuda}-lf{measured.version('llamafactory')}"
    commit = measured.labels.get("org.opencontainers.image.revision", "")[:12]
    return (f"{what}-{commit}", what, cuda) if commit else (what, cuda)


def drift(measured: Measured, wanted: Mapping[str, str]) -> list[str]:
    """Return one line for each input of an image that differs in this clone."""
    names = {
        engine.STACK: "configs/stack.yml",
        engine.LOCK: "the lock",
        engine.SOURCES: "tunesmith's sources",
    }
    return [
        f"the image differs from this clone in {what}; rebuild it with `inv image.build`"
        for label, what in names.items()
        if measured.labels.get(label) != wanted[label]
    ]


def sbom(measured: Measured, name: str) -> str:
    """Return a CycloneDX document (JSON) of an image, from its measured content."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot5
    from packageurl import PackageURL

    bom = Bom()
    digest = measured.image_id.partition(":")[2]
    bom.metadata.component = Component(
        name=name.partition(":")[0],
        version=digest[:12],
        type=ComponentType.CONTAINER,
        bom_ref=f"image-{digest[:12]}",
    )
    for package in measured.packages:
        url = PackageURL("pypi", None, normal(package.name), package.version)
        licences = [DisjunctiveLicense(name=package.licence)] if package.licence else []
        bom.components.add(
            Component(
                name=package.name,
                version=package.version,
                purl=url,
                licenses=licences,
                bom_ref=url.to_string(),
            )
        )
    for title, version, architecture in measured.system:
        qualifiers = {"arch": architecture, "distro": "-".join(filter(None, measured.os))}
        url = PackageURL("deb", measured.os[0], title.partition(":")[0], version, qualifiers)
        bom.components.add(
            Component(name=title, version=version, purl=url, bom_ref=url.to_string())
        )
    bom.register_dependency(bom.metadata.component, bom.components)
    return str(JsonV1Dot5(bom).output_as_string(indent=2)) + "\n"


def normal(name: str) -> str:
    """Return a package's name as PyPI compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _line(licence: Any) -> str | None:
    """Return a licence's name; some packages contain its whole text instead."""
    lines = str(licence or "").strip().splitlines()
    return lines[0][:80] if lines and lines[0].strip() not in ("", "UNKNOWN") else None


def _key(package: Package) -> str:
    return normal(package.name)
