"""The verbs on configs/stack.yml and on this machine's training environment."""

from __future__ import annotations

import time
from pathlib import Path

from tunesmith.cli.console import say
from tunesmith.cli.follow import duration
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import human_bytes
from tunesmith.core.mirrors import load_mirror
from tunesmith.project import Project


def show_stack(root: Path) -> None:
    """Print what is pinned, and which environments are here."""
    project = Project.at(root)
    stack = project.stack
    say(f"Python {stack.python}, LLaMA-Factory {stack.llamafactory}")
    for flavour in stack.flavours.values():
        default = " (default)" if flavour.name == stack.default_flavour else ""
        capabilities = ", ".join(flavour.compute_capabilities)
        installed = project.environment(flavour.name)
        state = f"installed in {installed.path}" if installed.current() else "not installed here"
        say(f"{flavour.name}{default}: CUDA {flavour.cuda}, {' '.join(flavour.requirements)}")
        say(f"  driver >= {flavour.minimum_driver}, compute capability {capabilities}")
        say(f"  lock {flavour.lock_sha256[:12]}, {human_bytes(flavour.size_bytes)}, {state}")
    for line in stack.requirements:
        say(f"  {line}")
    for key, value in sorted(stack.variables.items()):
        say(f"{key}={value}")


def lock_stack(root: Path, *, mirror: str, dry: bool) -> None:
    """Resolve the locks anew."""
    from tunesmith.stack import environment as stack_environment

    project = Project.at(root)
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    if dry:
        for flavour in project.stack.flavours.values():
            say(f"would resolve {flavour.lock} from {len(project.stack.inputs(flavour))} lines")
        return
    for path in stack_environment.lock(project.stack, project.root, profile):
        say(f"{path}")


def render_stack(root: Path, *, dry: bool) -> None:
    """Rewrite the files derived from the stack."""
    from tunesmith.maintain import render

    project = Project.at(root)
    for path, text in render.render(project).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            say(f"{path}: up to date")
        elif dry:
            say(f"{path}: would be rewritten")
        else:
            render.write(path, text)
            say(f"{path}: rewritten")


def check_stack(root: Path) -> None:
    """Fail when a lock or a derived file is not of this stack.yml."""
    from tunesmith.maintain import render
    from tunesmith.stack import definition

    project = Project.at(root)
    lines = [*definition.drift(project.stack), *render.drift(project)]
    if lines:
        raise TunesmithError(f"{len(lines)} files have drifted from configs/stack.yml", lines)
    say("locks and derived files are of this configs/stack.yml")


def install_stack(root: Path, flavour: str | None, *, mirror: str, dry: bool) -> None:
    """Install the training environment of this machine."""
    from tunesmith.stack import environment as stack_environment

    project = Project.at(root)
    environment = project.environment(flavour)
    if dry:
        say(f"would install {environment.flavour.lock} in {environment.path}")
        return
    began = time.monotonic()
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    project.folder()
    versions = stack_environment.install(project.stack, environment, project.root, profile, say)
    if versions is None:
        say(f"training environment: {environment.path} ({environment.flavour.name}, current)")
        return
    say(
        f"training environment: {environment.path} (Python {versions['python']}, LLaMA-Factory "
        f"{versions['llamafactory']}, torch {versions['torch']}) in "
        f"{duration(time.monotonic() - began)}"
    )
