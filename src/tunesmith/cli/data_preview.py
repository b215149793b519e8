"""`inv data.preview`: rows as the model sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from tunesmith.cli.console import console, say
from tunesmith.cli.data_check import config_values, training_python
from tunesmith.core.errors import UsageError
from tunesmith.core.printable import printable
from tunesmith.dataset.training_job import run_job
from tunesmith.plan import build
from tunesmith.project import Project


def preview(
    project: Project,
    config: str,
    overrides: Sequence[str],
    *,
    rows: int,
    first: int,
    mirror: str,
) -> None:
    """Print rows as the model will see them, trained tokens marked."""
    if rows < 1 or first < 1:
        raise UsageError("--rows and --first count from 1")
    read = build.read_config(project, Path(config), overrides)
    python, environment = training_python(project, read.values, mirror)
    request = {"config": config_values(project, read, mirror), "rows": rows, "first": first}
    previewed = run_job(python, environment, "tunesmith.job.data.preview", request)["rows"]
    for row in previewed:
        say(_head(row))
        if console.is_terminal:
            text = Text()
            for piece in row["pieces"]:
                text.append(
                    printable(piece["text"]), style="bold green" if piece["trained"] else "dim"
                )
            console.print(text, soft_wrap=True)
        else:
            marked = ("[[{}]]" if piece["trained"] else "{}" for piece in row["pieces"])
            texts = (piece["text"] for piece in row["pieces"])
            say("".join(mark.format(text) for mark, text in zip(marked, texts, strict=True)))
    mark = "bold green" if console.is_terminal else "between [[ and ]]"
    say(f"\ntrained tokens are {mark}; the rest is read only")


def _head(row: Mapping[str, Any]) -> str:
    name = f"--- row {row['row']} of {row['dataset']}"
    if row["dropped"]:
        return f"{name}: dropped by LLaMA-Factory; `inv data.check` says why"
    cut = f", {row['cut']} more are cut off" if row["cut"] else ""
    return f"{name}: {row['tokens']} tokens, {row['trained']} trained{cut}"
