"""From a config, options and a target to a plan: read once, check, decide; starts nothing."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tunesmith.basemodel import fetch as model_fetch
from tunesmith.basemodel.fetch import ModelFolder
from tunesmith.basemodel.judge import require_trainable
from tunesmith.basemodel.kinds import Kind as ModelKind
from tunesmith.core import documents
from tunesmith.core.errors import UsageError
from tunesmith.dataset.media import MediaPlace
from tunesmith.dataset.prompts import load_prompts
from tunesmith.dataset.reading import Tables
from tunesmith.dataset.registry import check_registered
from tunesmith.dataset.report import DatasetReport
from tunesmith.dataset.tables import tables_of
from tunesmith.job.run import schema
from tunesmith.job.run.codec import decode
from tunesmith.job.run.run_id import LONGEST, RunId
from tunesmith.plan import hub_data, model_check, models, paths, presets, rows
from tunesmith.plan import trackers as tracking
from tunesmith.plan.config import Config, load_config, parse_overrides
from tunesmith.plan.gpus import rows_of_a_step
from tunesmith.plan.kind import Kind
from tunesmith.plan.options import THEN, TrainOptions, check_then, run_limits
from tunesmith.plan.plan import (
    EVALUATION,
    Plan,
    RunLocation,
    absolute_paths,
    apply_managed_keys,
    train_phases,
)
from tunesmith.plan.staging import stage_inputs
from tunesmith.plan.target import PowerControl, Target
from tunesmith.plan.target_packages import TargetPackages
from tunesmith.project import Project

# General prompts every measured run is asked, so that forgetting is seen.
GUARD = Path("configs") / "prompts" / "guard.yaml"
# What LLaMA-Factory's export takes; the rest of a merge config is about training.
MERGE_KEYS = ("export_size", "export_device", "export_legacy_format", "infer_dtype")
MERGE_DEFAULTS = {
    "export_size": 5,
    "export_device": "cpu",
    "export_legacy_format": False,
    # Without it LLaMA-Factory 0.9.3 writes float32 on a machine without CUDA: twice the size.
    "infer_dtype": "bfloat16",
}


def fetch_model(
    project: Project,
    name: str,
    progress: Callable[[model_fetch.Progress], None],
    *,
    mirror: str = "default",
    revision: str | None = None,
    from_path: Path | None = None,
    allow_pickle: bool = False,
    remote_code: bool = False,
    judge: model_fetch.Judge = require_trainable,
    kind: ModelKind = "model",
) -> ModelFolder:
    """Return the verified folder of a base model, fetched if it is not there.

    One that cannot be trained on, or by `judge` not for a run, is refused before its weights come.
    """
    environment = project.environment()

    def convert(gguf: Path, folder: Path) -> None:
        model_fetch.convert_with(environment.python, gguf, folder)

    return model_fetch.fetch(
        name,
        revision=revision,
        models=project.base_models,
        mirror=project.mirror(mirror),
        hf_home=project.hf_home,
        store=project.folder("models"),
        convert=convert,
        from_path=from_path,
        allow_pickle=allow_pickle,
        remote_code=remote_code,
        judge=judge,
        kind=kind,
        progress=progress,
    )


def read_config(
    project: Project,
    file: Path,
    overrides: Sequence[str],
    wanted: Sequence[Kind] = (),
    target: Target | None = None,
) -> Config:
    """Return a checked config of a `wanted` kind; a known model's template must be the right
    one.

    It may ask for the packages of `target`'s training environment, by default this machine's.
    """
    there = TargetPackages(project, target)
    schema = project.stack.schema
    config = load_config(project.find(file), overrides, schema, there, wanted, there.remedy)
    known = project.base_models.get(str(config.get("model_name_or_path")))
    template = config.get("template")
    if not known or template == known.template or "template" in config.overrides:
        return config
    if not template or "model_name_or_path" in config.overrides:
        # The file's template is that of the file's model; another model brings its own.
        brought = {"template": known.template}
        return replace(
            config, values={**config.values, **brought}, overrides={**config.overrides, **brought}
        )
    raise UsageError(
        f"{config.file}: `template` is {template}, but {known.repo_id} was trained with "
        f"{known.template}",
        hint=f"write `template: {known.template}`, or insist with `template={template}` on the "
        "command line",
    )


def plan_training(project: Project, target: Target, options: TrainOptions) -> Plan:
    """Return the plan of a training, with its data checked. Starts and writes nothing.

    A base model that is fetched here is put in later (`Plan.with_model`): until then the config
    has its name. Raises UsageError for a fault in config, data, prompts or options.
    """
    check_then(options.then)
    limits = run_limits(max_hours=options.max_hours, price=options.price, max_cost=options.max_cost)
    run_id = None if options.run_id is None else RunId(options.run_id)
    written = read_config(project, options.config, options.overrides, ("train",), target)
    preset = presets.preset_of(written, options.preset)
    config, changed = presets.apply(written, preset)
    prompts = load_prompts(project.find(options.prompts)) if options.prompts else ()
    location = target.location(run_id or new_run_id(config.stem))
    values, managed = apply_managed_keys(config, location)
    managed += [
        schema.ManagedKey(key, config.get(key), was, why) for key, (was, why) in changed.items()
    ]
    values.setdefault("dataset_dir", "data")  # LLaMA-Factory's own default
    absolute_paths(values, project.find)
    paths.check(config.file, values)
    named, resolved = models.settle(project, target, config, values)
    before = {key: was for key, (was, _) in changed.items()}
    wish = model_check.wish_of_training(target, options, config.overrides, values, before)
    model = model_check.check_model(project, str(values.get(models.BASE)), wish)
    reports = check_data(values, tables_here(project))
    network = network_of(project, target, values, options.mirror)
    made = rows.planned(values, reports)
    told = rows.lines(made, values)
    staged = stage_inputs(target, location.run.name, values, reports, named)
    name = str(values.get("model_name_or_path"))
    phases = train_phases(config, prompts, evaluate=options.evaluate)
    guard = load_prompts(project.root / GUARD) if "before" in phases else ()
    notes = list(model.notes)
    if "before" not in phases:
        notes.append("nothing is held out: no before/after comparison")
    if options.gpus is not None:
        notes.append(rows_of_a_step(values, options.gpus, keep_batch=options.keep_batch))
    needs: dict[str, int] = {}
    spec = target.fetch_spec(name, options.revision, options.mirror)
    downloads = tuple(item.download for item in named if item.download)
    if spec:
        phases = ("check", "fetch", *phases)
        if known := project.base_models.get(name):
            both = "the base model, if it is not there, and the merged one"
            needs = {both: 2 * known.size_bytes, "reserve": 1_000_000_000}
    if "merge" in options.then:
        phases = (*phases, "merge", "proof")
    request = replace(
        request_of(project, config, location, models.about(config, named), name),
        data=rows.recorded([decode(schema.DataFile, report.to_json()) for report in reports], made),
        owned=(*managed, *resolved),
        origins=tuple(item.origin for item in named if item.told),
        downloads=downloads if spec else (),
        phases=tuple(phases),
        prompts=tuple(schema.PromptItem(**asdict(prompt)) for prompt in prompts),
        guard=tuple(schema.PromptItem(**asdict(prompt)) for prompt in guard),
        evaluate=schema.EvaluateOptions(**EVALUATION),
        merge=merge_keys(project, config),
        limits=limits,
        env={
            **location.env,
            **network,
            **tracking.variables(values, os.environ, Path.home(), here=target.name == "local"),
        },
        then=tuple(word for word in THEN if word in options.then),
        preset=preset,
        fetch=spec,
        price=options.price,
        gpus=options.gpus,
        keep_batch=options.keep_batch,
    )
    if target.shared:
        request = replace(request, turn="wait" if options.queue else "refuse")
    then = options.then
    if "poweroff" in then and "pull" not in then and isinstance(target, PowerControl):
        # With a pull, the one who pulled does it, when everything has arrived.
        command = schema.PostRunCommand(target.poweroff_command(), "succeeded")
        request = replace(request, after=command)
    return Plan(
        location,
        phases,
        request,
        values,
        (*managed, *resolved),
        needs,
        tuple(notes),
        staged.inputs,
        staged.links,
        () if spec else downloads,
        models.known(named),
        told,
        model.estimate,
    )


def tables_here(project: Project) -> Tables | None:
    """Return the reader of CSV and Parquet, None where there is no training environment."""
    environment = project.environment()
    if not environment.current():
        return None
    return tables_of(environment.python, {"HF_HOME": str(project.hf_home)})


def check_data(values: documents.Config, tables: Tables | None = None) -> list[DatasetReport]:
    """Check the data sets a config names. Raises UsageError naming all faults of the first
    faulty file. Without `tables`, CSV and Parquet are passed over."""
    names = [values[key] for key in ("dataset", "eval_dataset") if values.get(key)]
    folder = str(values.get("dataset_dir", "data"))
    if not names:
        return []
    stage = str(values.get("stage", "sft"))
    place = media_place(values, Path(folder))
    reports = list(
        check_registered(Path(folder), ",".join(names), stage, tables=tables, media=place)
    )
    for report in reports:
        report.raise_if_bad()
    return reports


def media_place(values: documents.Config, dataset_dir: Path) -> MediaPlace:
    """Return where a config's pictures, films and sounds lie, and for which template."""
    template = values.get("template")
    return MediaPlace(
        Path(str(values.get("media_dir") or dataset_dir)),
        None if template is None else str(template),
    )


def plan_merge(
    project: Project,
    target: Target,
    run_id: str | None,
    overrides: Sequence[str],
    *,
    accept: bool = False,
) -> Plan:
    """Return the plan that merges a run's adapter and proves the result.

    `accept`: merge although a way to the model puts another prompt before it than the training.
    """
    run_id, request, config = trained_run(target, run_id)
    chosen = dict(request.needed_merge()) | {"accept_mismatch": accept}
    if overrides:
        parsed = parse_overrides(overrides)
        unknown = sorted(set(parsed) - set(MERGE_KEYS))
        if unknown:
            raise UsageError(
                f"`{unknown[0]}` is no key of a merge; known are: {', '.join(MERGE_KEYS)}"
            )
        chosen |= parsed
    weights = sum(
        record.size
        for name, record in request.needed_model().files.items()
        if name.endswith(".safetensors")
    )
    needs = {"the merged model": weights, "reserve": 200_000_000}
    location = target.location(run_id)
    return Plan(location, ("merge", "proof"), replace(request, merge=chosen), config, (), needs)


def merge_keys(project: Project, config: Config) -> documents.Config:
    """Return how to merge: the merge config of the same stem, over the defaults.

    It lies in the folder merge/ beside the config's own, as in configs/; a container has its
    own copies of ours besides.
    """
    beside = config.file.absolute().parent.parent / "merge" / config.file.name
    file = beside if beside.is_file() else project.root / "configs" / "merge" / config.file.name
    if not file.is_file():
        return dict(MERGE_DEFAULTS)
    values = load_config(file, (), project.stack.schema).values
    return MERGE_DEFAULTS | {key: values[key] for key in MERGE_KEYS if key in values}


def new_run_id(stem: str) -> str:
    """Return an id that sorts by time and says what ran."""
    when = time.strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "run"
    return RunId(f"{when}-{name}"[:LONGEST])


def request_of(
    project: Project, config: Config, location: RunLocation, what: str, path: str | None = None
) -> schema.RunRequest:
    """Return what run.json says of any new run; `what` ends its title.

    `path` is the base model's, where the config names a folder or a run's result.
    """
    name = str(config.get("model_name_or_path"))
    return schema.RunRequest(
        run_id=location.run.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config_file=shown(project, config.file),
        stem=config.stem,
        title=f"{name} {what}",
        model=schema.ModelRef(path or name),
        overrides=dict(config.overrides),
    )


def shown(project: Project, path: Path) -> str:
    """Return a path as people write it: relative to the repository where it lies in it."""
    return str(path.relative_to(project.root) if path.is_relative_to(project.root) else path)


def network_of(
    project: Project, target: Target, values: documents.Config, mirror: str | None
) -> dict[str, str]:
    """Return the variables of a job that reads a config's data sets.

    The base model is there and verified: nothing may be fetched behind our back, unless a data
    set lives on a hub. A host has its own way to the hubs. Raises UsageError for a data set that
    cannot be fetched.
    """
    entries = hub_data.remote_entries(values)
    there = TargetPackages(project, target)
    hub_data.check(entries, there, there.remedy)
    if entries and target.shared:
        return {"HF_HUB_OFFLINE": "0"}
    return hub_data.environment(entries, project.mirror(mirror or "default"))


def needed_key(target: Target, run_id: str, config: documents.Config, key: str) -> Any:
    """Return what a run's config says. Raises UsageError where it says nothing."""
    if not config.get(key):
        raise UsageError(
            f"run {run_id} on {target.name}: its config.yaml has no {key}",
            hint="write it there again",
        )
    return config[key]


def check_trained(target: Target, run_id: str) -> None:
    """Raise UsageError unless a run's training succeeded."""
    trained_run(target, run_id)


def trained_run(
    target: Target, run_id: str | None
) -> tuple[str, schema.RunRequest, documents.Config]:
    """Return id, request and config of a run whose training succeeded."""
    found = target.find(run_id)
    phases = target.status(found).phases
    if phases.get("train") != "succeeded":
        state = phases.get("train", "not started")
        on = f" --on {target.name}" if target.shared else ""
        raise UsageError(
            f"run {found}: its training is {state}",
            hint=f"`inv resume{on} --run {found}` continues it",
        )
    return found, target.request(found), target.config(found)
