"""The user's verbs on runs: each checks, plans, and hands the plan to a target."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tunesmith.basemodel import catalogue
from tunesmith.basemodel import fetch as model_fetch
from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.fetch import ModelFolder
from tunesmith.core import disk, formats
from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import load_mirror
from tunesmith.dataset.prompts import load_prompts
from tunesmith.dataset.reading import Tables
from tunesmith.dataset.registry import REGISTRY, check_registered
from tunesmith.dataset.report import DatasetReport
from tunesmith.dataset.tables import tables_of
from tunesmith.job.run import inputs, schema
from tunesmith.job.run.codec import decode
from tunesmith.job.run.run_id import LONGEST, RunId
from tunesmith.plan import presets
from tunesmith.plan.config import Config, load_config, parse_overrides
from tunesmith.plan.plan import (
    EVALUATION,
    PATH_KEYS,
    Input,
    Owned,
    Place,
    Plan,
    absolute_paths,
    disk_needs,
    own_keys,
    train_phases,
)
from tunesmith.plan.target import PowerControl, Target
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


# What may follow a training, in the order of doing: the first on the target, the others by
# whoever follows the run.
THEN = ("merge", "report", "pull", "poweroff")


@dataclass(frozen=True)
class Asked:
    """What the user asked of a training: files, overrides and options, as typed.

    `queue` waits for a host that is at work instead of refusing. `then` is what follows a
    success (THEN). `price` is money per hour; `max_hours` and `max_cost` end the training
    with a checkpoint. `mirror` None: as the target was set up. `preset` None: the one that the
    config's head names.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    prompts: Path | None = None
    evaluate: bool = True
    run_id: str | None = None
    revision: str | None = None
    mirror: str | None = None
    queue: bool = False
    then: tuple[str, ...] = ()
    price: float | None = None
    max_hours: float | None = None
    max_cost: float | None = None
    preset: str | None = None


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a comma-separated option."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def number_of(option: str, text: str) -> float | None:
    """Return a number as typed; None for nothing. Raises UsageError naming the option."""
    try:
        return float(text) if text else None
    except ValueError:
        raise UsageError(f"--{option} {text}: expected a number, as in 1.98") from None


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
) -> ModelFolder:
    """Return the verified folder of a base model, fetched if it is not there.

    One that needs code of its author is refused first of all, unless `remote_code`.
    """
    environment = project.environment()

    def convert(gguf: Path, folder: Path) -> None:
        model_fetch.convert_with(environment.python, gguf, folder)

    return model_fetch.fetch(
        name,
        revision=revision,
        models=known_models(project),
        mirror=load_mirror(mirror, project.root / "configs" / "mirrors"),
        hf_home=project.hf_home,
        store=project.folder("models"),
        convert=convert,
        from_path=from_path,
        allow_pickle=allow_pickle,
        remote_code=remote_code,
        progress=progress,
    )


def known_models(project: Project) -> Mapping[str, catalogue.BaseModel]:
    """Return configs/models.yml."""
    return catalogue.load_models(project.root / "configs" / "models.yml")


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

    `model` None (a dry run before the download, a target that fetches by itself) leaves the
    model's name in the config. Raises UsageError for a fault in config, data, prompts or
    options.
    """
    run_id = None if asked.run_id is None else RunId(asked.run_id)
    written = read_config(project, asked.config, asked.overrides)
    preset = presets.preset_of(written.file, asked.preset)
    config, changed = presets.apply(written, preset)
    prompts = load_prompts(project.find(asked.prompts)) if asked.prompts else ()
    place = target.place(run_id or new_run_id(config.stem))
    name = str(config.get("model_name_or_path"))
    values, owned = own_keys(config, place, str(model.path) if model else name)
    owned += [Owned(key, config.get(key), was, why) for key, (was, why) in changed.items()]
    values.setdefault("dataset_dir", "data")  # LLaMA-Factory's own default
    absolute_paths(values, project.find)
    reports = check_data(values, tables_here(project))
    brought = bring(target, place.run.name, values, reports)
    phases = train_phases(config, prompts, evaluate=asked.evaluate)
    guard = load_prompts(project.root / GUARD) if "before" in phases else ()
    notes = [] if "before" in phases else ["nothing is held out: no before/after comparison"]
    needs: dict[str, int] = {}
    order = None if model else target.fetch_order(name, asked.revision, asked.mirror)
    if model:
        weights = sum(r.size for n, r in model.files.items() if n.endswith(".safetensors"))
        needs = disk_needs(config, model_files.tensor_shapes(model.path), weights, merge=True)
        notes.append(f"base model from {model.source}")
    elif order:
        phases = ("fetch", *phases)
        if known := known_models(project).get(name):
            both = "the base model, if it is not there, and the merged one"
            needs = {both: 2 * known.size_bytes, "reserve": 1_000_000_000}
    if "merge" in asked.then:
        phases = (*phases, "merge", "proof")
    request = replace(
        _request(project, config, place, model, f"on {config.get('dataset')}"),
        data=tuple(decode(schema.DataFile, report.to_json()) for report in reports),
        owned=tuple(schema.ManagedKey(**asdict(item)) for item in owned),
        phases=tuple(phases),
        prompts=tuple(schema.PromptItem(**asdict(prompt)) for prompt in prompts),
        guard=tuple(schema.PromptItem(**asdict(prompt)) for prompt in guard),
        evaluate=schema.EvaluateOptions(**EVALUATION),
        merge=merge_keys(project, config),
        limits=limits_of(asked),
        env={**place.env, **_offline(reports)},
        then=tuple(word for word in THEN if word in asked.then),
        preset=preset,
        fetch=order,
        price=asked.price,
    )
    if target.shared:
        request = replace(request, turn="wait" if asked.queue else "refuse")
    if "poweroff" in asked.then and "pull" not in asked.then and isinstance(target, PowerControl):
        # With a pull, the one who pulled does it, when everything has arrived.
        command = schema.PostRunCommand(target.poweroff_command(), "succeeded")
        request = replace(request, after=command)
    return Plan(place, phases, request, values, tuple(owned), needs, tuple(notes), brought)


def limits_of(asked: Asked) -> schema.Limits:
    """Return run.json's limits for what was asked. Raises UsageError for what makes no sense."""
    unknown = [word for word in asked.then if word not in THEN]
    if unknown:
        raise UsageError(f"--then {unknown[0]}: it takes {', '.join(THEN)}")
    for option in ("price", "max_hours", "max_cost"):
        value = getattr(asked, option)
        if value is not None and not value > 0:
            raise UsageError(f"--{option.replace('_', '-')} {value}: expected more than 0")
    hours = [asked.max_hours] if asked.max_hours is not None else []
    if asked.max_cost is not None:
        if asked.price is None:
            raise UsageError("--max-cost needs the price of an hour: --price 1.98/h")
        hours.append(asked.max_cost / asked.price)
    return schema.Limits(max_seconds=round(3600 * min(hours), 1) if hours else None)


def bring(
    target: Target,
    run_id: str,
    values: dict[str, Any],
    reports: Sequence[DatasetReport],
    below: str = "",
) -> tuple[Input, ...]:
    """Turn the paths in `values` into the target's, and return the files that must go there.

    They go `below` a folder of the run's inputs. Raises UsageError for a data file outside
    its dataset_dir, where another machine would not find it.
    """
    found: list[Input] = []
    for key in PATH_KEYS:
        path = values.get(key)
        if not isinstance(path, str) or not Path(path).is_absolute():
            continue
        name = f"{below}{key}"
        values[key] = target.seen(run_id, name, Path(path))
        if values[key] == path:
            continue
        if key == "dataset_dir":
            files = [Path(report.file) for report in reports if _lies_here(report)]
            found += _below(Path(path), [Path(path) / REGISTRY, *files], name)
        elif Path(path).is_dir():
            found += _below(Path(path), sorted(Path(path).rglob("*")), name)
        elif Path(path).is_file():
            found.append(Input(f"{name}/{Path(path).name}", Path(path)))
    return tuple(found)


def _below(folder: Path, files: Sequence[Path], into: str) -> list[Input]:
    found: dict[str, Input] = {}
    for file in files:
        if not file.is_relative_to(folder):
            raise UsageError(
                f"{file}: lies outside {folder} and would not be found on a host; copy it there "
                "and register it with `inv data.register`"
            )
        if file.is_dir():
            found |= {i.name: i for i in _below(folder, sorted(file.rglob("*")), into)}
        else:
            name = f"{into}/{file.relative_to(folder).as_posix()}"
            found[name] = Input(name, file)
    return list(found.values())


def start_training(project: Project, target: Target, plan: Plan) -> str:
    """Create the plan's run and start it; return its id. Refuses a disk that is too small."""
    check_room(target, plan.needs)
    target.create(plan)
    try:
        target.start(plan.run_id, plan.phases, "user")
    except UsageError:
        # It was refused, so there is nothing in it yet.
        target.remove(plan.run_id)
        raise
    return plan.run_id


def tables_here(project: Project) -> Tables | None:
    """Return the reader of CSV and Parquet, None where there is no training environment."""
    environment = project.environment()
    if not environment.current():
        return None
    return tables_of(environment.python, {"HF_HOME": str(project.hf_home)})


def check_data(values: Mapping[str, Any], tables: Tables | None = None) -> list[DatasetReport]:
    """Check the data sets a config names. Raises UsageError naming all faults of the first
    faulty file. Without `tables`, CSV and Parquet are passed over."""
    names = [values[key] for key in ("dataset", "eval_dataset") if values.get(key)]
    folder = str(values.get("dataset_dir", "data"))
    if not names or folder.startswith(("ONLINE", "REMOTE:")):
        return []
    stage = str(values.get("stage", "sft"))
    reports = list(check_registered(Path(folder), ",".join(names), stage, tables=tables))
    for report in reports:
        report.raise_if_bad()
    return reports


def _lies_here(report: DatasetReport) -> bool:
    """Whether the data set is files of this machine, not an address."""
    return Path(report.file).is_absolute() and Path(report.file).exists()


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
    run_id, request, config = _trained(target, run_id)
    chosen = dict(request.needed_merge()) | {"accept_mismatch": accept}
    if overrides:
        parsed = parse_overrides(overrides)
        unknown = sorted(set(parsed) - set(MERGE_KEYS))
        if unknown:
            raise UsageError(
                f"`{unknown[0]}` is no key of a merge; these are: {', '.join(MERGE_KEYS)}"
            )
        chosen |= parsed
    weights = sum(
        record.size
        for name, record in request.needed_model().files.items()
        if name.endswith(".safetensors")
    )
    needs = {"the merged model": weights, "reserve": 200_000_000}
    place = target.place(run_id)
    return Plan(place, ("merge", "proof"), replace(request, merge=chosen), config, (), needs)


def plan_predict(
    project: Project,
    target: Target,
    file: Path,
    overrides: Sequence[str],
    run_id: str | None,
    model: ModelFolder | None,
    mirror: str | None = None,
) -> Plan:
    """Return the plan of a prediction with a run's adapter, or without a run the base model's."""
    config = read_config(project, file, overrides)
    phases: tuple[str, ...] = ("predict",)
    if run_id:
        run_id, request, trained = _trained(target, run_id)
        place = target.place(run_id)
        base = str(needed_key(target, run_id, trained, "model_name_or_path"))
        values, owned = own_keys(config, place, base, "predict")
        if "adapter_name_or_path" not in config.overrides:
            was, adapter = values.get("adapter_name_or_path"), str(place.run / "output")
            owned.append(Owned("adapter_name_or_path", adapter, was, "the run's own"))
            values["adapter_name_or_path"] = adapter
    else:
        place = target.place(new_run_id(f"{config.stem}-predict"))
        name = str(config.get("model_name_or_path"))
        values, owned = own_keys(config, place, str(model.path) if model else name, "predict")
        if "adapter_name_or_path" in values and "adapter_name_or_path" not in config.overrides:
            was = values.pop("adapter_name_or_path")
            owned.append(Owned("adapter_name_or_path", None, was, "no --run: the base model"))
        order = None if model else target.fetch_order(name, None, mirror)
        phases = ("fetch", *phases) if order else phases
        what = f"predicts {config.get('eval_dataset')}"
        request = replace(
            _request(project, config, place, model, what),
            phases=tuple(phases),
            limits=schema.Limits(),
            env={**place.env, "HF_HUB_OFFLINE": "1"},
            fetch=order,
            turn="refuse" if target.shared else None,
        )
    values.setdefault("dataset_dir", "data")
    absolute_paths(values, project.find)
    reports = check_data(values, tables_here(project))
    # Of its own: a run's other inputs are what its training has read.
    brought = bring(target, place.run.name, values, reports, below="predict/")
    # The record of an earlier prediction's is not of these.
    recorded = {k: v for k, v in request.inputs.items() if k != inputs.PREDICT}
    request = replace(request, predict=values, inputs=recorded)
    return Plan(place, phases, request, None, tuple(owned), inputs=brought)


def start_on_run(target: Target, plan: Plan) -> str:
    """Start a plan's phases on the run it names, making the run if it is new."""
    check_room(target, plan.needs)
    if target.exists(plan.run_id):
        target.renew(plan)
    else:
        target.create(plan)
    target.start(plan.run_id, plan.phases, "user")
    return plan.run_id


def set_limit(target: Target, run_id: str, max_hours: float) -> None:
    """Let a run work for so many hours in all, those before included."""
    limits = limits_of(Asked(Path(), max_hours=max_hours))
    request = target.request(run_id)
    before = request.limits or schema.Limits()
    limits = replace(before, max_seconds=limits.max_seconds)
    target.renew(Plan(target.place(run_id), (), replace(request, limits=limits)))


def merge_keys(project: Project, config: Config) -> dict[str, Any]:
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


def check_room(target: Target, needs: Mapping[str, int]) -> None:
    """Refuse to start what the target's disk cannot hold, with the sum."""
    if not needs:
        return
    where, free = target.room()
    disk.require(
        where,
        sum(needs.values()),
        "this run",
        free=free,
        detail=[f"{formats.size(size):>9}  {what}" for what, size in needs.items()],
        hint="free space there, lower save_total_limit, or set TUNESMITH_HOME to a larger disk",
    )


def new_run_id(stem: str) -> str:
    """Return an id that sorts by time and says what ran."""
    when = time.strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "run"
    return RunId(f"{when}-{name}"[:LONGEST])


def _request(
    project: Project, config: Config, place: Place, model: ModelFolder | None, what: str
) -> schema.RunRequest:
    """Return what run.json says of any new run; `what` ends its title."""
    name = str(config.get("model_name_or_path"))
    return schema.RunRequest(
        run_id=place.run.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        config_file=shown(project, config.file),
        stem=config.stem,
        title=f"{name} {what}",
        model=_model_record(name, model),
        overrides=dict(config.overrides),
    )


def shown(project: Project, path: Path) -> str:
    """Return a path as people write it: relative to the repository where it lies in it."""
    return str(path.relative_to(project.root) if path.is_relative_to(project.root) else path)


def _model_record(name: str, model: ModelFolder | None) -> schema.ModelRef:
    if model is None:
        return schema.ModelRef(name)
    files = {n: schema.FileRecord(r.size, r.sha256) for n, r in model.files.items()}
    return schema.ModelRef(name, str(model.path), model.source, model.revision, files)


def _offline(reports: Sequence[DatasetReport]) -> dict[str, str]:
    """The base model is here and verified: nothing may be fetched behind our back, unless a
    data set lives on a hub."""
    return {"HF_HUB_OFFLINE": "1"} if all(map(_lies_here, reports)) else {}


def needed_key(target: Target, run_id: str, config: Mapping[str, Any], key: str) -> Any:
    """Return what a run's config says. Raises UsageError where it says nothing."""
    if not config.get(key):
        raise UsageError(
            f"run {run_id} on {target.name}: its config.yaml has no {key}; write it there again"
        )
    return config[key]


def check_trained(target: Target, run_id: str) -> None:
    """Raise UsageError unless a run's training succeeded."""
    _trained(target, run_id)


def _trained(target: Target, run_id: str | None) -> tuple[str, schema.RunRequest, dict[str, Any]]:
    """Return id, request and config of a run whose training succeeded."""
    found = target.find(run_id)
    phases = target.status(found).phases
    if phases.get("train") != "succeeded":
        state = phases.get("train", "not started")
        on = f" --on {target.name}" if target.shared else ""
        raise UsageError(
            f"run {found}: its training is {state}; `inv resume{on} --run {found}` continues it"
        )
    return found, target.request(found), target.config(found)
