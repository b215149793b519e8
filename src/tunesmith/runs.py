"""The user's verbs on runs: each checks, plans, and hands the plan to a target."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from tunesmith import hub, modelfiles, models
from tunesmith.config import Config, load_config, parse_overrides
from tunesmith.dataset.prompts import load_prompts
from tunesmith.dataset.registry import check_registered
from tunesmith.dataset.report import DatasetReport
from tunesmith.errors import UsageError
from tunesmith.files import human_bytes, read_json, write_json
from tunesmith.hub import ModelFolder
from tunesmith.job.rundir import OWNER_FILE, RunFolder
from tunesmith.mirrors import load_mirror
from tunesmith.plan import (
    EVALUATION,
    Owned,
    Place,
    Plan,
    absolute_paths,
    disk_needs,
    own_keys,
    train_phases,
)
from tunesmith.project import Project
from tunesmith.targets.base import Target
from tunesmith.targets.local import LocalTarget

# What LLaMA-Factory's export takes; the rest of a merge config is about training.
MERGE_KEYS = ("export_size", "export_device", "export_legacy_format", "infer_dtype")
MERGE_DEFAULTS = {
    "export_size": 5,
    "export_device": "cpu",
    "export_legacy_format": False,
    # Without it LLaMA-Factory 0.9.3 writes float32 on a machine without CUDA: twice the size.
    "infer_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Asked:
    """What the user asked of a training: files, overrides and options, as typed."""

    config: Path
    overrides: tuple[str, ...] = ()
    prompts: Path | None = None
    evaluate: bool = True
    run_id: str | None = None
    revision: str | None = None


def target_of(project: Project, name: str, flavour: str | None = None) -> Target:
    """Return the target `--on` names. Raises UsageError for one that does not exist."""
    if name == "local":
        return LocalTarget(project, flavour)
    raise UsageError(f"unknown target {name!r}; known are: local")


def fetch_model(
    project: Project,
    name: str,
    progress: Callable[[hub.Progress], None],
    *,
    mirror: str = "default",
    revision: str | None = None,
    from_path: Path | None = None,
    allow_pickle: bool = False,
) -> ModelFolder:
    """Return the verified folder of a base model, fetched if it is not there."""
    environment = project.environment()

    def convert(gguf: Path, folder: Path) -> None:
        hub.convert_with(environment.python, gguf, folder)

    return hub.fetch(
        name,
        revision=revision,
        models=known_models(project),
        mirror=load_mirror(mirror, project.root / "configs" / "mirrors"),
        hf_home=project.hf_home,
        store=project.models,
        convert=convert,
        from_path=from_path,
        allow_pickle=allow_pickle,
        progress=progress,
    )


def known_models(project: Project) -> Mapping[str, models.BaseModel]:
    """Return configs/models.yml."""
    return models.load_models(project.root / "configs" / "models.yml")


def read_config(project: Project, file: Path, overrides: Sequence[str]) -> Config:
    """Return a checked config; a known model's template must be the right one."""
    config = load_config(project.find(file), overrides, project.stack.schema)
    known = known_models(project).get(str(config.get("model_name_or_path")))
    template = config.get("template")
    if not known or template == known.template or "template" in config.overrides:
        return config
    if "model_name_or_path" in config.overrides:
        # The file's template is that of the file's model; another model brings its own.
        brought = {"template": known.template}
        return replace(
            config, values={**config.values, **brought}, overrides={**config.overrides, **brought}
        )
    raise UsageError(
        f"{config.file}: `template` is {template}, but {known.repo_id} was trained with "
        f"{known.template}; write `template: {known.template}`, or insist with "
        f"`template={template}` on the command line"
    )


def plan_training(
    project: Project, target: Target, asked: Asked, model: ModelFolder | None
) -> Plan:
    """Return the plan of a training, with its data checked. Starts and writes nothing.

    `model` None (a dry run before the download) leaves the model's name in the config.
    Raises UsageError for a fault in config, data or prompts, or when the disk is too small.
    """
    config = read_config(project, asked.config, asked.overrides)
    prompts = load_prompts(project.find(asked.prompts)) if asked.prompts else ()
    place = target.place(asked.run_id or new_run_id(config.stem))
    model_path = str(model.path) if model else str(config.get("model_name_or_path"))
    values, owned = own_keys(config, place, model_path)
    values.setdefault("dataset_dir", "data")  # LLaMA-Factory's own default
    absolute_paths(values, project.find)
    reports = check_data(values)
    phases = train_phases(config, prompts, evaluate=asked.evaluate)
    notes = [] if "before" in phases else ["nothing is held out: no before/after comparison"]
    needs: dict[str, int] = {}
    if model:
        weights = sum(r.size for n, r in model.files.items() if n.endswith(".safetensors"))
        needs = disk_needs(config, modelfiles.tensor_shapes(model.path), weights, merge=True)
        notes.append(f"base model from {model.source}")
    request = _request(project, config, place, model, f"on {config.get('dataset')}") | {
        "data": [report.to_json() for report in reports],
        "owned": [asdict(item) for item in owned],
        "phases": list(phases),
        "prompts": [asdict(prompt) for prompt in prompts],
        "evaluate": dict(EVALUATION),
        "merge": merge_keys(project, config),
        "limits": {},
        "env": dict(place.env) | _offline(reports),
    }
    return Plan(place, phases, request, values, tuple(owned), needs, tuple(notes))


def start_training(project: Project, target: Target, plan: Plan) -> str:
    """Create the plan's run and start it; return its id. Refuses a disk that is too small."""
    check_room(plan.place.run, plan.needs)
    output = Path(str((plan.config or {})["output_dir"]))
    refuse_foreign_output(output, plan.place)
    target.create(plan)
    run_id = plan.place.run.name
    target.start(run_id, plan.phases)
    return run_id


def check_data(values: Mapping[str, Any]) -> list[DatasetReport]:
    """Check the data sets a config names. Raises UsageError naming all faults of the first
    faulty file."""
    names = [values[key] for key in ("dataset", "eval_dataset") if values.get(key)]
    folder = str(values.get("dataset_dir", "data"))
    if not names or folder.startswith(("ONLINE", "REMOTE:")):
        return []
    reports = list(check_registered(Path(folder), ",".join(names), str(values.get("stage", "sft"))))
    for report in reports:
        report.raise_if_bad()
    return reports


def plan_merge(project: Project, run_id: str | None, overrides: Sequence[str]) -> Plan:
    """Return the plan that merges a run's adapter and proves the result."""
    folder, request, config = _trained(project, run_id)
    chosen = dict(request["merge"])
    if overrides:
        parsed = parse_overrides(overrides)
        unknown = sorted(set(parsed) - set(MERGE_KEYS))
        if unknown:
            raise UsageError(
                f"`{unknown[0]}` is no key of a merge; these are: {', '.join(MERGE_KEYS)}"
            )
        chosen |= parsed
    weights = sum(
        record["size"]
        for name, record in request["model"]["files"].items()
        if name.endswith(".safetensors")
    )
    place = _place_of(folder, project)
    needs = {"the merged model": weights, "reserve": 200_000_000}
    return Plan(place, ("merge", "proof"), request | {"merge": chosen}, config, (), needs)


def plan_predict(
    project: Project,
    target: Target,
    file: Path,
    overrides: Sequence[str],
    run_id: str | None,
    model: ModelFolder | None,
) -> Plan:
    """Return the plan of a prediction with a run's adapter, or without a run the base model's."""
    config = read_config(project, file, overrides)
    if run_id:
        folder, request, trained = _trained(project, run_id)
        place = _place_of(folder, project)
        values, owned = own_keys(config, place, str(trained["model_name_or_path"]), "predict")
        if "adapter_name_or_path" not in config.overrides:
            owned.append(
                Owned(
                    "adapter_name_or_path",
                    str(folder.output),
                    values.get("adapter_name_or_path"),
                    "the run's own",
                )
            )
            values["adapter_name_or_path"] = str(folder.output)
    else:
        place = target.place(new_run_id(f"{config.stem}-predict"))
        model_path = str(model.path) if model else str(config.get("model_name_or_path"))
        values, owned = own_keys(config, place, model_path, "predict")
        if "adapter_name_or_path" in values and "adapter_name_or_path" not in config.overrides:
            was = values.pop("adapter_name_or_path")
            owned.append(Owned("adapter_name_or_path", None, was, "no --run: the base model"))
        what = f"predicts {config.get('eval_dataset')}"
        request = _request(project, config, place, model, what) | {
            "phases": ["predict"],
            "limits": {},
            "env": dict(place.env) | {"HF_HUB_OFFLINE": "1"},
        }
    values.setdefault("dataset_dir", "data")
    absolute_paths(values, project.find)
    check_data(values)
    return Plan(place, ("predict",), request | {"predict": values}, None, tuple(owned))


def start_on_run(target: Target, plan: Plan) -> str:
    """Start a plan's phases on the run it names, making the run if it is new."""
    check_room(plan.place.run, plan.needs)
    folder = RunFolder(plan.place.run)
    if folder.request_file.is_file():
        if folder.busy():
            # The lock would refuse it too, but only after the request was rewritten.
            raise UsageError(
                f"run {folder.run_id} is being worked on; wait for it (`inv attach --run "
                f"{folder.run_id}`) or end it (`inv stop --run {folder.run_id}`)"
            )
        write_json(folder.request_file, plan.request)
    else:
        target.create(plan)
    target.start(folder.run_id, plan.phases)
    return folder.run_id


def merge_keys(project: Project, config: Config) -> dict[str, Any]:
    """Return how to merge: the merge config of the same stem, over the defaults."""
    file = project.root / "configs" / "merge" / config.file.name
    if not file.is_file():
        return dict(MERGE_DEFAULTS)
    values = load_config(file, (), project.stack.schema).values
    return MERGE_DEFAULTS | {key: values[key] for key in MERGE_KEYS if key in values}


def check_room(folder: Path, needs: Mapping[str, int]) -> None:
    """Refuse to start what the disk cannot hold, with the sum."""
    if not needs:
        return
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free, total = shutil.disk_usage(existing).free, sum(needs.values())
    if free < total:
        raise UsageError(
            f"{existing}: {human_bytes(free)} free, this run may need {human_bytes(total)}; free "
            "space, lower save_total_limit, or set TUNESMITH_HOME to a larger disk",
            [f"{human_bytes(size):>9}  {what}" for what, size in needs.items()],
        )


def new_run_id(stem: str) -> str:
    """Return an id that sorts by time and says what ran."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "run"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


def _request(
    project: Project, config: Config, place: Place, model: ModelFolder | None, what: str
) -> dict[str, Any]:
    """Return what run.json says of any new run; `what` ends its title."""
    name = str(config.get("model_name_or_path"))
    return {
        "run_id": place.run.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_file": shown(project, config.file),
        "stem": config.stem,
        "title": f"{name} {what}",
        "model": _model_record(name, model),
        "overrides": dict(config.overrides),
    }


def shown(project: Project, path: Path) -> str:
    """Return a path as people write it: relative to the repository where it lies in it."""
    return str(path.relative_to(project.root) if path.is_relative_to(project.root) else path)


def _model_record(name: str, model: ModelFolder | None) -> dict[str, Any]:
    if model is None:
        return {"name": name, "path": None, "source": None, "revision": None, "files": {}}
    files = {n: {"size": r.size, "sha256": r.sha256} for n, r in model.files.items()}
    return {
        "name": name,
        "path": str(model.path),
        "source": model.source,
        "revision": model.revision,
        "files": files,
    }


def _offline(reports: Sequence[DatasetReport]) -> dict[str, str]:
    """The base model is here and verified: nothing may be fetched behind our back, unless a
    data set lives on a hub."""
    return {} if any(report.rows is None for report in reports) else {"HF_HUB_OFFLINE": "1"}


def _trained(
    project: Project, run_id: str | None
) -> tuple[RunFolder, dict[str, Any], dict[str, Any]]:
    """Return folder, request and config of a run whose training succeeded."""
    folder = RunFolder(project.run_folder(run_id))
    request, phases = folder.request(), folder.status()["phases"]
    if phases.get("train") != "succeeded":
        state = phases.get("train", "not started")
        raise UsageError(
            f"run {folder.run_id}: its training is {state}; `inv resume --run {folder.run_id}` "
            "continues it"
        )
    config = yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))
    return folder, request, config


def _place_of(folder: RunFolder, project: Project) -> Place:
    return LocalTarget(project).place(folder.run_id)


def refuse_foreign_output(output: Path, place: Place) -> None:
    """The supervisor checks this under its lock too; here it is said before a run is made."""
    if place.run in output.parents or not output.is_dir() or not any(output.iterdir()):
        return
    owner_file = output / OWNER_FILE
    owner = (
        f"belongs to run {read_json(owner_file)['run_id']}" if owner_file.is_file() else "has files"
    )
    raise UsageError(
        f"{output}: this output folder {owner}; choose another with `output_dir=PATH`, or leave "
        "the key out"
    )
