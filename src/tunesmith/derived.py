"""Files rendered from configs/stack.yml: committed, and checked for drift."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tunesmith.errors import TunesmithError, UsageError
from tunesmith.files import human_bytes, write_text
from tunesmith.project import Project

_TABLE = re.compile(
    r"(?P<head><!-- stack: rendered by `inv stack.render` -->\n).*?(?P<tail><!-- /stack -->)", re.S
)


def render(project: Project) -> dict[Path, str]:
    """Return path -> text of every derived file, as it should be.

    Needs the training environment, because the config schema comes from LLaMA-Factory's
    own dataclasses. Raises UsageError when it is not installed.
    """
    environment = project.environment()
    if not environment.current():
        raise UsageError(f"{environment.path}: not installed; `inv stack.install` makes it")
    argv = [str(environment.python), "-m", "tunesmith.job.schema"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TunesmithError(
            "the config schema could not be rendered", done.stderr.splitlines()[-8:]
        )
    return {project.stack.schema: done.stdout, **_readmes(project)}


def write(path: Path, text: str) -> None:
    """Write one derived file, whole or not at all."""
    write_text(path, text)


def drift(project: Project) -> list[str]:
    """Return one line for each derived file that can be checked without the training
    environment and is not as it should be."""
    lines = []
    for path, text in _readmes(project).items():
        if path.read_text(encoding="utf-8") != text:
            lines.append(f"{path}: its stack table is old; `inv stack.render` renews it")
    if not project.stack.schema.is_file():
        lines.append(f"{project.stack.schema}: missing; `inv stack.render` makes it")
    return lines


def _readmes(project: Project) -> dict[Path, str]:
    """Return each README with its version table renewed."""
    rows = ["| flavour | CUDA | torch | driver | on disk |", "|---|---|---|---|---|"]
    for flavour in project.stack.flavours.values():
        torch = next(line for line in flavour.requirements if line.startswith("torch=="))
        default = " (default)" if flavour.name == project.stack.default_flavour else ""
        rows.append(
            f"| `{flavour.name}`{default} | {flavour.cuda} | {torch.removeprefix('torch==')} "
            f"| >= {flavour.minimum_driver} | {human_bytes(flavour.size_bytes)} |"
        )
    head = f"Python {project.stack.python}, LLaMA-Factory {project.stack.llamafactory}.\n\n"
    table = head + "\n".join(rows) + "\n"
    texts = {}
    for path in sorted(project.root.glob("README*.md")):
        text = path.read_text(encoding="utf-8")
        texts[path] = _TABLE.sub(lambda m: m["head"] + table + m["tail"], text)
    return texts
