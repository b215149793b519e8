"""The whole path with a small model."""

from __future__ import annotations

import time
from pathlib import Path

from tunesmith.cli.console import say
from tunesmith.cli.follow import duration
from tunesmith.cli.results import merge, report
from tunesmith.cli.stack import install_stack
from tunesmith.cli.training import Choices, train
from tunesmith.plan import build
from tunesmith.project import Project


def demo(root: Path, *, mirror: str, dry: bool) -> None:
    """Do the main job with the small model: fetch, train, measure, merge, prove, report."""
    asked = build.Asked(
        Path("configs/train/smollm2_135m_lora_sft.yaml"),
        prompts=Path("configs/prompts/philosophy.yaml"),
        mirror=mirror,
    )
    if dry:
        train(root, "local", asked, Choices(dry=True))
        return
    began = time.monotonic()
    install_stack(root, None, mirror=mirror, dry=False)
    run_id = train(root, "local", asked, Choices())
    merge(root, "local", run_id, (), dry=False)
    report(root, "local", run_id, language="en")
    folder = Project.at(root).run_folder(run_id)
    say("")
    say(f"run:     {folder}")
    say(f"adapter: {folder / 'output'}")
    say(f"merged:  {folder / 'merged'}")
    say(f"chat:    .venv/bin/inv chat --run {run_id}")
    say(f"all in   {duration(time.monotonic() - began)}")
