"""run:RUN_ID in a config: the result of another run, its adapter or its whole model.

Looked for on the target first, where it is used without a transfer, then among the runs of this
machine, pulled ones included. One that is not finished is refused with the command for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.basemodel import kinds
from tunesmith.basemodel.kinds import Kind
from tunesmith.core.documents import Config
from tunesmith.core.errors import UsageError
from tunesmith.job.run import config as run_config
from tunesmith.job.run import seals
from tunesmith.job.run.folder import MERGED, RunFolder
from tunesmith.job.run.manifest import output_of
from tunesmith.job.run.remedies import part
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import FileRecord, ModelRef, RunStatus
from tunesmith.plan.target import Target
from tunesmith.project import Project

PREFIX = "run:"
OUTPUT = "output"


@dataclass(frozen=True)
class RunResult:
    """A finished result of a run: its adapter or whole model, in the run's `folder`.

    `path` is where it lies on this machine, None where it lies on the target. `host` is where it
    was trained if not here. `files` are the records of its seals, empty where there are none.
    `base` and `template` are those of its training.
    """

    run_id: str
    folder: str
    path: Path | None
    host: str | None = None
    base: ModelRef = field(default_factory=ModelRef)
    template: str | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)


def find(project: Project, target: Target, run_id: str, kind: Kind) -> RunResult:
    """Return a run's result of a kind. Raises UsageError where there is none that is finished."""
    run_id = RunId(run_id)
    if target.shared and target.exists(run_id):
        config = target.config(run_id)
        folder = _folder(run_id, kind, target.status(run_id), config, f" --on {target.name}")
        base = target.request(run_id).model or ModelRef()
        return RunResult(run_id, folder, None, target.name, base, _template(config))
    run = RunFolder(project.run_folder(run_id))
    config = run.config() if run.config_file.is_file() else {}
    folder = _folder(run_id, kind, run.status(), config, "")
    path = run.path / MERGED if folder == MERGED else output_of(run)
    host = run.copied().host if run.is_copy else None
    if problems := kinds.verify(kind, path):
        what = MERGED if folder == MERGED else "adapter"
        raise UsageError(
            f"run {run_id}: {problems[0]}",
            hint=f"`inv pull --on {host} --run {run_id} --what {what}` brings it"
            if host
            else f"`inv logs --run {run_id}` shows what its training wrote",
        )
    sealed = {
        name.partition("/")[2]: FileRecord(int(record["size"]), str(record["sha256"]))
        for name, record in seals.read(run.path).items()
        if part(name) == folder
    }
    chosen = kinds.choose(kind, sealed)
    files = {name: sealed[name] for name in chosen}
    base = run.request().model or ModelRef()
    return RunResult(run_id, folder, path, host, base, _template(config), files)


def _template(config: Config) -> str | None:
    return str(config["template"]) if config.get("template") else None


def _folder(run_id: str, kind: Kind, status: RunStatus, config: Config, on: str) -> str:
    """Return the folder of a run that has its result of a kind, once its phase has succeeded."""
    trained = status.phases.get("train", "not started")
    if trained != "succeeded":
        verb = "attach" if status.active else "resume"
        does = "follows it to its end" if status.active else "finishes it"
        raise UsageError(
            f"run {run_id}: its training is {trained}, so it has no result",
            hint=f"`inv {verb}{on} --run {run_id}` {does}",
        )
    lora = config.get("finetuning_type", "lora") == "lora"
    if kind in kinds.ADAPTERS and not lora:
        raise UsageError(
            f"run {run_id}: its result is a whole model (finetuning_type: "
            f"{config['finetuning_type']}), no adapter",
            hint=f"write `model_name_or_path: {PREFIX}{run_id}`",
        )
    below = run_config.tuned_adapters(config, Path(OUTPUT))[:-1]
    if kind in kinds.ADAPTERS and below:
        raise UsageError(
            f"run {run_id}: its result is {len(below) + 1} adapters, one on top of the other, "
            "which count together only",
            hint=f"`inv merge{on} --run {run_id}`, then write "
            f"`model_name_or_path: {PREFIX}{run_id}`",
        )
    if kind in kinds.ADAPTERS or not lora:
        return OUTPUT
    if {status.phases.get("merge"), status.phases.get("proof")} != {"succeeded"}:
        raise UsageError(
            f"run {run_id}: it has no merged model that was proven",
            hint=f"`inv merge{on} --run {run_id}` makes it",
        )
    return MERGED
