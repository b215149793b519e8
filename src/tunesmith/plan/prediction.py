"""The plan of a prediction: with a run's adapter, or without a run the base model's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.files import short_digest
from tunesmith.job.run import config as run_config
from tunesmith.job.run import inputs, schema
from tunesmith.plan import model_check, models, paths
from tunesmith.plan.build import (
    check_data,
    needed_key,
    network_of,
    new_run_id,
    read_config,
    request_of,
    tables_here,
    trained_run,
)
from tunesmith.plan.config import Config
from tunesmith.plan.plan import (
    Plan,
    absolute_paths,
    apply_managed_keys,
    set_model_path,
)
from tunesmith.plan.staging import stage_inputs
from tunesmith.plan.target import Target
from tunesmith.project import Project


def plan_predict(
    project: Project,
    target: Target,
    file: Path,
    overrides: Sequence[str],
    run_id: str | None,
    mirror: str | None = None,
) -> Plan:
    """Return the plan of a prediction with a run's adapter, or without a run the base model's.

    A base model that is fetched here is put in later, as with `plan_training`.
    """
    config = read_config(project, file, overrides, ("predict", "evaluate loss"), target)
    # What a run's config names is its own, and lies on the target.
    own: set[str] = set()
    if run_id:
        run_id, request, trained = trained_run(target, run_id)
        location = target.location(run_id)
        base = str(needed_key(target, run_id, trained, "model_name_or_path"))
        values, managed = apply_managed_keys(config, location, prediction_folder(config))
        managed = set_model_path(values, managed, base)
        own.add(models.BASE)
        if "adapter_name_or_path" not in config.overrides:
            own.add("adapter_name_or_path")
            tuned = run_config.tuned_adapters(trained, Path(location.run / "output"))
            was, adapter = values.get("adapter_name_or_path"), ",".join(tuned)
            managed.append(schema.ManagedKey("adapter_name_or_path", adapter, was, "the run's own"))
            values["adapter_name_or_path"] = adapter
    else:
        location = target.location(new_run_id(f"{config.stem}-predict"))
        values, managed = apply_managed_keys(config, location, prediction_folder(config))
        if "adapter_name_or_path" in values and "adapter_name_or_path" not in config.overrides:
            was = values.pop("adapter_name_or_path")
            managed.append(
                schema.ManagedKey("adapter_name_or_path", None, was, "no --run: the base model")
            )
        what = f"predicts {config.get('eval_dataset')}"
        request = replace(
            request_of(project, config, location, what),
            limits=schema.Limits(),
            env={**location.env, "HF_HUB_OFFLINE": "1"},
            turn="refuse" if target.shared else None,
        )
    values.setdefault("dataset_dir", "data")
    absolute_paths(values, project.find)
    paths.check(config.file, values)
    named, resolved = models.settle(project, target, config, values, own)
    reports = check_data(values, tables_here(project))
    network = network_of(project, target, values, mirror)
    if network["HF_HUB_OFFLINE"] == "0":
        request = replace(request, env={**(request.env or {}), **network})
    # Of its own: a run's other inputs are what its training has read.
    staged = stage_inputs(target, location.run.name, values, reports, named, below="predict/")
    # The record of an earlier prediction's is not of these.
    recorded = {k: v for k, v in request.inputs.items() if k != inputs.PREDICT}
    downloads = tuple(item.download for item in named if item.download)
    phases: tuple[str, ...] = ("predict",)
    spec = None
    if run_id is None:
        name = str(values.get(models.BASE))
        wish = model_check.wish_of(values, config.overrides, merge=False, machine=None)
        model_check.check_model(project, name, wish)
        spec = target.fetch_spec(name, None, mirror)
        phases = ("check", "fetch", *phases) if spec else phases
        model = schema.ModelRef(name)
        request = replace(request, model=model, phases=phases, fetch=spec)
    elif downloads:
        raise UsageError(
            f"{config.file}: `{downloads[0].key}` is {downloads[0].name}, a hub's name, which is "
            f"not fetched for run {run_id}",
            hint="name a folder or run:RUN_ID, or leave --run out",
        )
    origins = tuple(item.origin for item in named if item.told)
    request = replace(
        request,
        predict=values,
        inputs=recorded,
        downloads=downloads if spec else (),
        origins=origins if run_id is None else request.origins,
    )
    return Plan(
        location,
        phases,
        request,
        None,
        (*managed, *resolved),
        inputs=staged.inputs,
        links=staged.links,
        downloads=() if spec else downloads,
        known=models.known(named),
    )


def prediction_folder(config: Config) -> str:
    """Return the folder of a prediction's results below its run: one for each data set.

    A name that a pull would not take (job/run/allowed.py) is written otherwise.
    """
    named = str(config.get("eval_dataset") or config.get("dataset") or "rows")
    plain = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", named).lstrip(".+=-")[:80]
    name = plain if plain == named else f"{plain}-{short_digest(named)}".lstrip("-")
    return f"predict/{name}"
