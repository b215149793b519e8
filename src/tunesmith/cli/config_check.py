"""Check a config without running it: our rules, its data, LLaMA-Factory's own parser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.cli.console import say
from tunesmith.core import formats
from tunesmith.job.run.schema import DataFile
from tunesmith.plan import build, parser, prediction
from tunesmith.plan.config import load_config
from tunesmith.plan.kind import kind_of, remedy_of
from tunesmith.plan.options import TrainOptions
from tunesmith.plan.plan import Plan
from tunesmith.project import Project
from tunesmith.targets import factory


def check(project: Project, file: Path, overrides: Sequence[str]) -> None:
    """Check a config of any kind and say which verb runs it; change nothing.

    Raises UsageError with the first fault and the change that ends it.
    """
    # For its kind alone: keys and types. A plan reads it with everything else.
    config = load_config(project.find(file), overrides, project.stack.schema)
    kind = kind_of(config.values)
    shown = build.shown(project, config.file)
    plan = _planned(project, config.file, tuple(overrides), kind)
    say(f"config  {shown}: to {kind}; keys and values are right")
    for item in plan.request.data if plan else ():
        say(f"data    {_told(item)}")
    if plan is not None:
        seconds = parser.ask_planned(project, plan)
    else:
        seconds = parser.ask(project, kind, shown, config.values)
    say(f"parser  {verdict(project, seconds)}")
    say(f"verb    {remedy_of(config.values, shown)}")


def verdict(project: Project, seconds: float | None) -> str:
    """Return what LLaMA-Factory's parser has said to a config that it did not refuse."""
    name = f"LLaMA-Factory {project.stack.llamafactory}"
    if seconds is None:
        size = formats.size(project.environment().flavour.size_bytes)
        return f"{name} was not asked: `inv stack.install` ({size}) brings it here"
    return f"{name} takes it ({formats.duration(seconds)})"


def _planned(project: Project, file: Path, overrides: tuple[str, ...], kind: str) -> Plan | None:
    target = factory.target_of(project, "local", say)
    if kind == "train":
        options = TrainOptions(config=file, overrides=overrides)
        return build.plan_training(project, target, options)
    if kind in ("predict", "evaluate loss"):
        return prediction.plan_predict(project, target, file, overrides, None)
    return None


def _told(item: DataFile) -> str:
    if item.rows is None:
        return f"{item.key}: from {item.file}, not checked"
    return f"{item.key}: {item.rows} rows checked"
