"""Resolves configs/stack.yml into hashed locks.

An extra's lock is what it adds to the flavours' locks, which stay as they are. All extras agree on
the version of what several of them need, so that they can be added one after the other.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import replacing
from tunesmith.core.mirrors import Mirror
from tunesmith.stack import uv
from tunesmith.stack.definition import DIGEST_PREFIX, Flavour, Stack

_PIN = re.compile(r"(?m)^([A-Za-z0-9._-]+==[^ ;\\]+)")


def lock(stack: Stack, project: Path, mirror: Mirror) -> tuple[Path, ...]:
    """Resolve the stack into hashed locks: a flavour's, the control environment's, an extra's."""
    written = []
    for flavour in stack.flavours.values():
        _compile(
            stack.inputs(flavour),
            _platform(stack),
            flavour.lock,
            stack.inputs_digest(flavour),
            mirror,
        )
        written.append(flavour.lock)
    manifest = str(project / "pyproject.toml")
    control = stack.path.parent / "locks" / "control.txt"
    arguments = ["--universal", "--python-version", stack.control_python.lstrip(">=")]
    arguments += ["--extra", "control", "--group", f"{manifest}:dev", manifest]
    _compile((), arguments, control, None, mirror)
    return (*written, control, *lock_extras(stack, mirror))


def lock_extras(stack: Stack, mirror: Mirror) -> tuple[Path, ...]:
    """Resolve the extras beside the flavours' locks.

    Raises TunesmithError when they cannot be had together, or not in the same versions beside
    every flavour.
    """
    lines = [line for extra in stack.extras.values() for line in extra.requirements]
    sources = [name for extra in stack.extras.values() for name in extra.source_packages]
    shared: list[str] = []
    for flavour in stack.flavours.values():
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "all.txt"
            arguments = _beside(stack, flavour, sources)
            _compile([*lines, *shared], arguments, target, None, mirror)
            found = _PIN.findall(target.read_text(encoding="utf-8"))
        if shared and found != shared:
            other = sorted(set(found) ^ set(shared))
            raise TunesmithError(f"extras beside {flavour.name} differ in {', '.join(other)}")
        shared = found
    written = []
    flavour = stack.flavour()
    for extra in stack.extras.values():
        with tempfile.TemporaryDirectory() as scratch:
            pins = Path(scratch) / "shared.txt"
            pins.write_text("\n".join(shared), encoding="utf-8")
            arguments = [*_beside(stack, flavour, extra.source_packages), "--constraint", str(pins)]
            extra.lock.parent.mkdir(exist_ok=True)
            _compile(extra.requirements, arguments, extra.lock, stack.extra_digest(extra), mirror)
        written.append(extra.lock)
    return tuple(written)


def _platform(stack: Stack) -> list[str]:
    return ["--python-version", stack.python, "--python-platform", stack.platform]


def _beside(stack: Stack, flavour: Flavour, sources: Sequence[str]) -> list[str]:
    """Return what lets uv resolve packages that come beside a flavour's, which stay."""
    arguments = [*_platform(stack), "--constraint", str(flavour.lock), "--only-binary", ":all:"]
    arguments += [f"--no-binary={name}" for name in sources]
    for name in sorted(flavour.packages):
        arguments += ["--no-emit-package", name]
    return arguments


def _compile(
    lines: Sequence[str],
    arguments: Sequence[str],
    target: Path,
    digest: str | None,
    mirror: Mirror,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # A new file: uv would keep the pins of an existing one.
        output, inputs = Path(scratch) / "lock.txt", Path(scratch) / "requirements.in"
        inputs.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        options = ["--generate-hashes", "--no-annotate", "--no-header", "-o", str(output)]
        asked = [*arguments, str(inputs)] if lines else arguments
        uv.run(["pip", "compile", *options, *asked], mirror)
        with replacing(target) as part:
            head = f"{DIGEST_PREFIX}{digest}\n" if digest else ""
            note = "# Made by `inv stack.lock`; do not edit.\n"
            part.write_text(head + note + output.read_text(encoding="utf-8"), encoding="utf-8")
