"""The verbs on base models."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import MIRROR


@command(
    "model.fetch",
    example="inv model.fetch deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --mirror cn",
    help={
        "name": "repo id, or a folder to verify",
        "revision": "branch, tag or commit",
        "mirror": MIRROR,
        "from": "take it from this folder or archive",
        "allow-pickle": "accept .bin weights, which can run code when loaded",
    },
)
def fetch(
    session: Session,
    name: str,
    revision: str = "",
    mirror: str = "default",
    from_: str = "",
    allow_pickle: bool = False,
) -> None:
    """Fetch and verify a base model."""
    from tunesmith.cli import base_model
    from tunesmith.cli.console import say
    from tunesmith.plan import build

    project = session.project
    if session.dry:
        say(f"would fetch {name} from {from_ or base_model.sources(project, name, mirror)}")
        return
    with base_model.fetching() as show:
        model = build.fetch_model(
            project,
            name,
            show,
            mirror=mirror,
            revision=revision or None,
            from_path=Path(from_) if from_ else None,
            allow_pickle=allow_pickle,
        )
    base_model.say_base_model(model)


@command("model.list", example="inv model.list")
def list_(session: Session) -> None:
    """List the known base models."""
    from rich.table import Table

    from tunesmith.cli.console import console
    from tunesmith.core import formats

    table = Table(
        "base model", "template", "weights", "licence", "sources", box=None, pad_edge=False
    )
    for model in session.project.base_models.values():
        size = formats.size(model.size_bytes)
        table.add_row(model.repo_id, model.template, size, model.licence, ", ".join(model.sources))
    console.print(table)
