"""The whole path with a small model."""

from __future__ import annotations

import time
from pathlib import Path

from tunesmith.cli.command import Session, command
from tunesmith.cli.options import MIRROR, TRAIN_CONFIG


@command(example="inv demo --mirror cn", help={"mirror": MIRROR})
def demo(session: Session, mirror: str = "default") -> None:
    """Run the whole path with a small model, without a GPU."""
    from tunesmith.cli import results, training
    from tunesmith.cli.console import say
    from tunesmith.cli.stack import install_environment
    from tunesmith.core import formats
    from tunesmith.plan.options import TrainOptions

    root, project = session.root, session.project
    options = TrainOptions(
        config=Path(TRAIN_CONFIG), prompts=Path("configs/prompts/philosophy.yaml"), mirror=mirror
    )
    if session.dry:
        training.train(root, "local", options, training.Choices(dry=True))
        return
    began = time.monotonic()
    install_environment(project, None, mirror)
    run_id = training.train(root, "local", options, training.Choices())
    if run_id is None:
        raise AssertionError("a training that is no dry run has an id")
    results.merge(root, "local", run_id, (), dry=False)
    results.report(root, "local", run_id, language="en")
    folder = project.run_folder(run_id)
    say("")
    say(f"run:     {folder}")
    say(f"adapter: {folder / 'output'}")
    say(f"merged:  {folder / 'merged'}")
    say(f"chat:    .venv/bin/inv chat --run {run_id}")
    say(f"all in   {formats.duration(time.monotonic() - began)}")
