"""LLaMA-Factory's own parser, asked in the training environment here about a config."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

from tunesmith.core.errors import UsageError
from tunesmith.dataset.training_job import run_job
from tunesmith.job.run.codec import encode
from tunesmith.job.run.schema import RunRequest
from tunesmith.plan.kind import Kind
from tunesmith.plan.plan import Plan
from tunesmith.project import Project

_MODULE = "tunesmith.job.training.config_check"
Parser = Literal["train", "infer", "eval"]
# hparams/parser.py of LLaMA-Factory: which of its commands reads a config with which parser.
PARSERS: Mapping[Kind, Parser] = {
    "train": "train",
    "predict": "train",
    "evaluate loss": "train",
    "merge": "infer",
    "chat": "infer",
    "benchmark": "eval",
}


def ask(
    project: Project,
    kind: Kind,
    file: str,
    values: Mapping[str, Any],
    request: RunRequest | None = None,
) -> float | None:
    """Return how many seconds it took; None where there is no training environment to ask.

    `request` is that of a training: its config is fitted to this machine first. Raises UsageError
    with the file, the keys, LLaMA-Factory's sentence and what ends it.
    """
    environment = project.environment()
    if not environment.current():
        return None
    began = time.monotonic()
    variables = {**project.stack.variables, "HF_HOME": str(project.hf_home)}
    asked = {
        "kind": PARSERS[kind],
        "config": dict(values),
        "request": None if request is None else encode(request),
    }
    try:
        run_job(environment.python, variables, _MODULE, asked, what="config")
    except UsageError as error:
        raise UsageError(f"{file}: {error.message}", error.detail, hint=error.hint) from None
    return time.monotonic() - began


def ask_planned(project: Project, plan: Plan) -> float | None:
    """`ask` for a training or a prediction that was planned. Raises as it does."""
    if plan.config is not None:
        return ask(project, "train", plan.request.config_file, plan.config, plan.request)
    return ask(project, "predict", plan.request.config_file, plan.request.predict or {})
