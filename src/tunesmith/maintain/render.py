"""Files rendered from configs/stack.yml, configs/failures.yml and the types of a run: committed,
and checked for drift."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tunesmith.core import formats, isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import write_text
from tunesmith.maintain import failure_pages, run_schema
from tunesmith.project import Project
from tunesmith.stack import definition as stacks

# A block of the Dockerfile; the words between the colon and the end tell blocks apart.
_BLOCK = re.compile(
    r"(?P<head># stack: (?P<what>\w+), rendered by `inv stack.render`\n).*?(?P<tail># /stack\n)",
    re.DOTALL,
)

# A README's version table stands between these.
_TABLE = ("<!-- stack: rendered by `inv stack.render` -->\n", "<!-- /stack -->")
_WORDS = {
    "en": {
        "pins": "Python {stack.python}, LLaMA-Factory {stack.llamafactory}.",
        "columns": "| flavour | CUDA | torch | driver | on disk |",
        "default": " (default)",
    },
    "zh": {
        "pins": "Python {stack.python}，LLaMA-Factory {stack.llamafactory}。",
        "columns": "| flavour | CUDA | torch | 驱动 | 占用磁盘 |",
        "default": "（默认）",
    },
}


def render(project: Project) -> dict[Path, str]:
    """Return path -> text of every derived file, as it should be.

    Needs the training environment, because the config schema comes from LLaMA-Factory's
    own dataclasses. Raises UsageError when it is not installed.
    """
    environment = project.environment()
    if not environment.current():
        raise UsageError(
            f"{environment.path}: not installed", hint="install it with `inv stack.install`"
        )
    rendered = {
        project.stack.schema: _asked(environment.python, "config_schema"),
        project.root / "src/tunesmith/basemodel/known.json": _asked(
            environment.python, "model_facts"
        ),
    }
    return rendered | _texts(project)


def _asked(python: Path, module: str) -> str:
    """Return what a module of job/data prints in the training environment."""
    argv = isolated.argv(python, f"tunesmith.job.data.{module}")
    done = subprocess.run(argv, cwd=isolated.NOWHERE, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TunesmithError(f"{module} could not be rendered", done.stderr.splitlines()[-8:])
    return done.stdout


def write(path: Path, text: str) -> None:
    """Write one derived file, whole or not at all."""
    write_text(path, text)


def drift(project: Project) -> list[str]:
    """Return one line for each derived file that can be checked without the training
    environment and is not as it should be."""
    lines = []
    for path, text in _texts(project).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            lines.append(f"{path}: what it has of configs/ is old; `inv stack.render` renews it")
    if not project.stack.schema.is_file():
        lines.append(f"{project.stack.schema}: missing; `inv stack.render` makes it")
    return lines


def _texts(project: Project) -> dict[Path, str]:
    """Return path -> text of what needs no training environment."""
    texts = _readmes(project) | _dockerfile(project) | failure_pages.render(project.root)
    return texts | run_schema.render(project.root)


def _dockerfile(project: Project) -> dict[Path, str]:
    """Return the Dockerfile with its blocks of arguments and variables renewed."""
    stack = project.stack
    arguments = {
        "BASE_IMAGE": stack.image_base,
        "PYTHON": stack.python,
        "ENVIRONMENT": stack.environment_name,
        "SOURCE_PACKAGES": " ".join(stack.source_packages),
        "FLAVOUR": stack.default_flavour,
        "REQUIRE": stacks.driver_requirement(stack.flavour()),
    }
    variables = " \\\n    ".join(f'{key}="{value}"' for key, value in stack.variables.items())
    blocks = {
        "arguments": "".join(f'ARG {key}="{value}"\n' for key, value in arguments.items()),
        # TOKENIZERS_PARALLELISM is taken for a secret by its name.
        "cuda": f'ARG CUDA="{stack.flavour().cuda}"\n',
        "variables": f"# hadolint ignore=DL3064\nENV {variables}\n",
    }
    path = project.root / "docker" / "Dockerfile"
    text = path.read_text(encoding="utf-8")
    return {path: _BLOCK.sub(lambda m: m["head"] + blocks[m["what"]] + m["tail"], text)}


def _readmes(project: Project) -> dict[Path, str]:
    """Return each README with its version table renewed."""
    texts = {}
    for path in sorted(project.root.glob("README*.md")):
        head, _, tail = path.read_text(encoding="utf-8").partition(_TABLE[0])
        table = _table(project.stack, "zh" if path.stem.endswith("_zh") else "en")
        texts[path] = f"{head}{_TABLE[0]}{table}{_TABLE[1]}{tail.partition(_TABLE[1])[2]}"
    return texts


def _table(stack: stacks.Stack, language: str) -> str:
    """Return the version table of a README."""
    words = _WORDS[language]
    lines = [words["pins"].format(stack=stack), "", words["columns"], "|---|---|---|---|---|"]
    for flavour in stack.flavours.values():
        torch = next(line for line in flavour.requirements if line.startswith("torch=="))
        default = words["default"] if flavour.name == stack.default_flavour else ""
        lines.append(
            f"| `{flavour.name}`{default} | {flavour.cuda} | {torch.removeprefix('torch==')} "
            f"| >= {flavour.minimum_driver} | {formats.size(flavour.size_bytes)} |"
        )
    return "\n".join(lines) + "\n"
