"""The verbs on configs/stack.yml and on this machine's training environment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import FLAVOUR, MIRROR

if TYPE_CHECKING:
    from tunesmith.project import Project


@command("stack.show", example="inv stack.show")
def show(session: Session) -> None:
    """Print the pins and variables in force."""
    from tunesmith.cli.console import say
    from tunesmith.core import formats

    project = session.project
    stack = project.stack
    say(f"Python {stack.python}, LLaMA-Factory {stack.llamafactory}")
    for flavour in stack.flavours.values():
        default = " (default)" if flavour.name == stack.default_flavour else ""
        capabilities = ", ".join(flavour.compute_capabilities)
        installed = project.environment(flavour.name)
        state = f"installed in {installed.path}" if installed.current() else "not installed here"
        say(f"{flavour.name}{default}: CUDA {flavour.cuda}, {' '.join(flavour.requirements)}")
        say(f"  driver >= {flavour.minimum_driver}, compute capability {capabilities}")
        say(f"  lock {flavour.lock_sha256[:12]}, {formats.size(flavour.size_bytes)}, {state}")
    for line in stack.requirements:
        say(f"  {line}")
    for key, value in sorted(stack.variables.items()):
        say(f"{key}={value}")


@command("stack.lock", example="inv stack.lock --mirror cn", help={"mirror": MIRROR})
def lock(session: Session, mirror: str = "default") -> None:
    """Resolve stack.yml into locks with hashes."""
    from tunesmith.cli.console import moving, say
    from tunesmith.stack import environment

    project = session.project
    profile = project.mirror(mirror)
    if session.dry:
        for flavour in project.stack.flavours.values():
            say(f"would resolve {flavour.lock} from {len(project.stack.inputs(flavour))} lines")
        return
    with moving("resolving"):
        locks = environment.lock(project.stack, project.root, profile)
    for path in locks:
        say(f"{path}")


@command("stack.render", example="inv stack.render")
def render(session: Session) -> None:
    """Rewrite every file derived from configs/."""
    from tunesmith.cli.console import say
    from tunesmith.maintain import render as derived

    for path, text in derived.render(session.project).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            say(f"{path}: up to date")
        elif session.dry:
            say(f"{path}: would be rewritten")
        else:
            derived.write(path, text)
            say(f"{path}: rewritten")


@command("stack.check", example="inv stack.check")
def check(session: Session) -> None:
    """Check locks and derived files for drift."""
    from tunesmith.cli.console import say
    from tunesmith.core.errors import TunesmithError
    from tunesmith.maintain import render as derived
    from tunesmith.stack import definition

    project = session.project
    lines = [*definition.drift(project.stack), *derived.drift(project)]
    if lines:
        raise TunesmithError(f"{len(lines)} files have drifted from configs/stack.yml", lines)
    say("locks and derived files are of this configs/stack.yml")


@command(
    "stack.install",
    example="inv stack.install --flavour cu126",
    help={"flavour": FLAVOUR, "mirror": MIRROR},
)
def install(session: Session, flavour: str = "", mirror: str = "default") -> None:
    """Install the training environment on this machine."""
    from tunesmith.cli.console import say

    project = session.project
    if session.dry:
        environment = project.environment(flavour or None)
        say(f"would install {environment.flavour.lock} in {environment.path}")
        return
    install_environment(project, flavour or None, mirror)


def install_environment(project: Project, flavour: str | None, mirror: str) -> None:
    """Install the training environment of a flavour; one that is current stays."""
    from tunesmith.cli.console import say, telling
    from tunesmith.core import formats
    from tunesmith.stack import environment as environments

    environment = project.environment(flavour)
    began = time.monotonic()
    profile = project.mirror(mirror)
    project.folder()
    with telling() as tell:
        versions = environments.install(project.stack, environment, project.root, profile, tell)
    if versions is None:
        say(f"training environment: {environment.path} ({environment.flavour.name}, current)")
        return
    say(
        f"training environment: {environment.path} (Python {versions['python']}, LLaMA-Factory "
        f"{versions['llamafactory']}, torch {versions['torch']}) in "
        f"{formats.duration(time.monotonic() - began)}"
    )
