"""The train config of a run: read, and the adapters that it names. Standard library and yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.job.run.folder import RunFolder


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the train config of a run; UsageError when there is none."""
    try:
        return RunFolder(run_dir).config()
    except FileNotFoundError:
        raise UsageError(
            f"{run_dir}: not a run folder (no config.yaml)", hint="`inv runs` lists the runs"
        ) from None


def starting_adapters(config: Mapping[str, Any]) -> list[str]:
    """Return the adapters the train config starts from, first to last."""
    listed = config.get("adapter_name_or_path") or []
    names = listed.split(",") if isinstance(listed, str) else listed
    return [str(name).strip() for name in names]


def tuned_adapters(config: Mapping[str, Any], output: Path) -> list[str]:
    """Return the adapters that make the trained model, first to last.

    LLaMA-Factory continues the last adapter it was given, so `output` takes its place,
    unless create_new_adapter put a new one on top of all of them.
    """
    started = starting_adapters(config)
    below = started if config.get("create_new_adapter") else started[:-1]
    return [*below, str(output)]
