"""A run that was pulled from a host, made one that can be used here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from tunesmith.basemodel.fetch import ModelFolder
from tunesmith.core.errors import UsageError
from tunesmith.core.files import write_json, write_text
from tunesmith.job.run import config as run_config
from tunesmith.job.run import foreign, inputs, seals
from tunesmith.job.run.codec import encode
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest
from tunesmith.project import Project


def adopt_pulled_run(
    project: Project,
    variables: Callable[[], Mapping[str, str]],
    run_id: str,
    fetch: Callable[[str], ModelFolder],
) -> None:
    """Let a run that was pulled from a host be used here, with the base model of this machine.

    `fetch` returns a base model by its name; `variables` returns those of jobs here. A run that
    was made here is left alone. Raises UsageError where the base model is not the run's, or not
    known.
    """
    folder = RunFolder(project.run_folder(run_id))
    if not folder.is_copy:
        return
    foreign.ensure(folder)
    request = folder.request()
    base = request.needed_model()
    if base.path and Path(base.path).is_dir():
        return
    host = folder.copied().host
    name = base.name
    weights = {
        file: record.sha256 for file, record in base.files.items() if file.endswith(".safetensors")
    }
    below = run_config.tuned_adapters(foreign.foreign_config(folder), folder.output)[:-1]
    if not name or not weights or below:
        what = "other adapters of its own" if below else "a base model of its own"
        raise UsageError(
            f"run {run_id} was trained on {host} with {what}, which is not known here",
            hint=f"use it on that host: --on {host}",
        )
    model = fetch(str(name))
    files = {file: record.sha256 for file, record in model.files.items()}
    for file, sha256 in weights.items():
        if files.get(file) != sha256:
            raise UsageError(
                f"run {run_id} was trained on other weights of {model.name} than those in "
                f"{model.path}",
                [f"{file}: sha256 {files.get(file)}, the run's base model has {sha256}"],
                hint=f"use it on the host: --on {host}",
            )
    named = [f.name for f in (folder.request_file, folder.config_file) if f.is_file()]
    with seals.rewriting(folder.path, seals.SETTLED, *named):
        _let_name(variables(), folder, request, model)
    # Those it was just compared in; others are read once more before their first use.
    same = {n: r for n, r in base.files.items() if files.get(n) == r.sha256}
    inputs.remember_model(folder.path, replace(base, path=str(model.path), files=same))


def _let_name(
    variables: Mapping[str, str], folder: RunFolder, request: RunRequest, model: ModelFolder
) -> None:
    """Let a run's config and request name the base model and the folders of this machine."""
    if folder.config_file.is_file():
        config = folder.config() | {"model_name_or_path": str(model.path)}
        config |= {"output_dir": str(folder.output), "trust_remote_code": False}
        write_text(folder.config_file, yaml.safe_dump(config, allow_unicode=True, sort_keys=True))
    base = replace(request.needed_model(), path=str(model.path))
    env = {**variables, "HF_HUB_OFFLINE": "1"}
    write_json(folder.request_file, encode(replace(request, model=base, env=env)))
