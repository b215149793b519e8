"""Config and target in, plan out: pure, so that a plan can be shown, tested and compared.

A plan says everything that will be done: the run folder's files, the exact config
LLaMA-Factory gets, the environment, the command. Nothing here reads or writes a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import yaml

from tunesmith.basemodel.files import Shapes
from tunesmith.basemodel.memory import Estimate
from tunesmith.basemodel.store import ModelFolder
from tunesmith.core import documents, formats, isolated
from tunesmith.core.documents import Arguments
from tunesmith.dataset.prompts import Prompt
from tunesmith.job.run.downloads import named_config, with_origin
from tunesmith.job.run.inputs import JSON_KEYS
from tunesmith.job.run.schema import (
    Download,
    FileRecord,
    ManagedKey,
    ModelRef,
    Origin,
    RunRequest,
)
from tunesmith.plan.config import Config

# Keys that name a file or folder; a worker runs in the run folder, so they must be absolute.
PATH_KEYS = (
    "dataset_dir",
    "tokenized_path",
    "media_dir",
    *JSON_KEYS,
    "export_quantization_dataset",
    "cache_dir",
)

# Greedy answers before and after: short ones, since what is wanted is the comparison.
EVALUATION = {"max_new_tokens": 64, "held_out_answers": 8, "batch_size": 32}


@dataclass(frozen=True)
class Input:
    """A file of this machine that a run reads on another one.

    `name` is where it will lie, relative to RUN/inputs.
    """

    name: str
    source: Path


@dataclass(frozen=True)
class Link:
    """A finished result of a run on the same target that a new run reads: linked, not copied.

    `folder` is output or merged; `name` is where it will lie, relative to RUN/inputs.
    """

    name: str
    run_id: str
    folder: str
    origin: Origin


@dataclass(frozen=True)
class RunLocation:
    """Where a run lives on its target: folder, interpreter, and the variables of jobs.

    The paths are the target's own; they may name nothing on this machine.
    """

    run: PurePath
    python: PurePath
    env: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What will be done for one job. `config` is None where no training happens.

    `downloads` are models beside the base model that are fetched to this machine first. `known`
    are records of files here that other runs have sealed.
    `rows` says what a pass takes of the data sets, and how many steps follow.
    """

    location: RunLocation
    phases: tuple[str, ...]
    request: RunRequest
    config: documents.Config | None = None
    managed: tuple[ManagedKey, ...] = ()
    needs: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    links: tuple[Link, ...] = ()
    downloads: tuple[Download, ...] = ()
    known: Mapping[Path, FileRecord] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    memory: Estimate | None = None

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.location.run.name

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that starts the job on its target."""
        words = ("start", str(self.location.run), *self.phases, "--cause", "user")
        return tuple(isolated.argv(self.location.python, "tunesmith.job", *words))

    def with_model(self, model: ModelFolder, shapes: Shapes) -> Plan:
        """Return the plan with its base model, which is on this machine now.

        `shapes` are those of the model's tensors by name; the room that a training needs
        follows from them.
        """
        record = model_record(self.request.needed_model().name, model)
        values = dict((self.request.predict or {}) if self.config is None else self.config)
        managed = tuple(set_model_path(values, self.managed, str(model.path)))
        if self.config is None:
            request = replace(self.request, model=record, predict=values)
            return replace(self, request=request, managed=managed)
        weights = sum(r.size for n, r in model.files.items() if n.endswith(".safetensors"))
        return replace(
            self,
            config=values,
            request=replace(self.request, model=record, owned=managed),
            managed=managed,
            needs=disk_needs(values, shapes, weights, merge=True),
            notes=(*self.notes, f"base model from {model.source}"),
        )

    def with_download(self, item: Download, model: ModelFolder) -> Plan:
        """Return the plan with one of its downloads, which is on this machine now."""
        left = tuple(other for other in self.downloads if other != item)
        files = {n: FileRecord(r.size, r.sha256) for n, r in model.files.items()}
        known = {**self.known, **{model.path / name: record for name, record in files.items()}}
        values = named_config(self.request, self.config, item, model.path)
        request = with_origin(self.request, item, model)
        plan = replace(self, downloads=left, known=known)
        if self.config is None:
            return replace(plan, request=replace(request, predict=values))
        return replace(plan, config=values, request=request)

    def render(self) -> str:
        """Return the plan as a person reads it."""
        lines = [f"run      {self.location.run}", f"phases   {' -> '.join(self.phases)}"]
        lines += [f"command  {shlex.join(self.argv)}"]
        lines += ["env", *(f"  {key}={value}" for key, value in sorted(self.location.env.items()))]
        if self.config is not None:
            body = yaml.safe_dump(dict(self.config), allow_unicode=True, sort_keys=True)
            lines += ["config.yaml", *(f"  {line}" for line in body.splitlines())]
        if self.managed:
            lines.append("decided by the job runner")
            lines += [f"  {o.key}: {o.value} (was {o.was}): {o.why}" for o in self.managed]
        if self.needs:
            lines.append("disk")
            lines += [f"  {formats.size(size):>9}  {what}" for what, size in self.needs.items()]
            lines.append(f"  {formats.size(sum(self.needs.values())):>9}  together")
        if self.memory:
            where = "of one GPU" if self.memory.device == "gpu" else "of this machine"
            lines += [f"memory {where}", *(f"  {line}" for line in self.memory.render())]
        if self.downloads or self.request.downloads:
            lines.append("fetched where it is not there")
            wanted = (*self.downloads, *self.request.downloads)
            lines += [f"  {item.name} as {item.key}" for item in wanted]
        if self.links:
            lines.append("used where it lies")
            lines += [f"  run {i.run_id}: {i.folder} -> inputs/{i.name}" for i in self.links]
        if self.inputs:
            lines.append("uploaded where they have changed")
            lines += [f"  {item.source} -> inputs/{item.name}" for item in self.inputs]
        lines += [f"data     {line}" for line in self.rows]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)


def model_record(name: str | None, model: ModelFolder) -> ModelRef:
    """Return what run.json says of a base model that is on this machine."""
    files = {n: FileRecord(r.size, r.sha256) for n, r in model.files.items()}
    return ModelRef(name, str(model.path), model.source, model.revision, files)


def set_model_path(values: Arguments, managed: Sequence[ManagedKey], path: str) -> list[ManagedKey]:
    """Let `values` name the base model's folder, in place; return the managed keys with it."""
    was = values.get("model_name_or_path")
    values["model_name_or_path"] = path
    if path == was:
        return list(managed)
    return [ManagedKey("model_name_or_path", path, was, "the verified folder"), *managed]


def apply_managed_keys(
    config: Config, location: RunLocation, output: str = "output"
) -> tuple[Arguments, list[ManagedKey]]:
    """Return the config a worker gets, and each key that differs from what was written.

    `output` is the name of the folder for results in the run's folder.
    """
    values = dict(config.values)
    managed: list[ManagedKey] = []

    def manage(key: str, value: Any, why: str) -> None:
        if key not in values or values[key] != value:
            managed.append(ManagedKey(key, value, values.get(key), why))
        values[key] = value

    if "output_dir" not in config.overrides:
        own = str(location.run / output)
        manage("output_dir", own, "a run keeps everything in its own folder")
    elif values.get("output_dir"):
        below = str(location.run / str(values["output_dir"]))
        manage("output_dir", below, "below the run's folder")
    if values.get("logging_dir"):
        below = str(location.run / str(values["logging_dir"]))
        manage("logging_dir", below, "below the run's folder")
    for key in ("overwrite_output_dir", "resume_from_checkpoint"):
        if values.pop(key, None) is not None:
            why = "decided at each start: continue from the newest sealed checkpoint"
            managed.append(ManagedKey(key, "by the job runner", config.get(key), why))
    if values.get("trust_remote_code") and not config.overrides.get("trust_remote_code"):
        manage("trust_remote_code", False, "code from a hub runs only on `trust_remote_code=true`")
    if values.get("save_only_model"):
        manage("save_only_model", False, "such checkpoints cannot be resumed")
    manage("logging_nan_inf_filter", False, "a loss of NaN must be seen, not averaged away")
    if "report_to" not in values:
        manage("report_to", "none", "no tracker unless you name one")
    if "include_num_input_tokens_seen" not in values:
        manage("include_num_input_tokens_seen", True, "for the throughput")
    if "disable_tqdm" not in values:
        manage("disable_tqdm", True, "the log is a file; progress is shown by tunesmith")
    return values, managed


def absolute_paths(values: Arguments, find: Callable[[str], Path]) -> None:
    """Make the path keys of `values` absolute, in place, by `find(path) -> Path`."""
    for key in PATH_KEYS:
        value = values.get(key)
        # Inline JSON is no path; "ONLINE" and "REMOTE:repo" are dataset_dir values without one.
        if not isinstance(value, str) or value.startswith(("ONLINE", "REMOTE:", "{")):
            continue
        path = find(value)
        # Without such a file it is the name of a data set on a hub.
        if key != "export_quantization_dataset" or path.exists() or value.startswith(("/", ".")):
            values[key] = str(path)


def train_phases(config: Config, prompts: Sequence[Prompt], *, evaluate: bool) -> tuple[str, ...]:
    """Return the phases of a training run: measured before and after where that can be done."""
    held_out = bool(config.get("eval_dataset")) or float(config.get("val_size") or 0) > 0
    measurable = config.get("stage", "sft") == "sft" and (held_out or bool(prompts))
    if evaluate and measurable and config.get("do_train"):
        return ("before", "train", "after")
    return ("train",)


def disk_needs(
    config: documents.Config,
    shapes: Shapes,
    weight_bytes: int,
    merge: bool,
) -> dict[str, int]:
    """Return the bytes a run may come to hold, by what holds them.

    A checkpoint has the trainable weights in float32 and two float32 Adam moments; one
    more than `save_total_limit` exists while the newest is being written.
    """
    matrices = [shape for name, (_, shape) in shapes.items() if _is_linear(name, shape)]
    if config.get("finetuning_type", "lora") == "lora":
        rank = int(config.get("lora_rank", 8))
        trainable = sum(rank * (shape[0] + shape[1]) for shape in matrices)
    else:
        trainable = sum(_product(shape) for _, shape in shapes.values())
    # Tokenizer files and trainer state lie beside the weights in each checkpoint.
    checkpoint = trainable * 12 + 16_000_000
    kept = int(config.get("save_total_limit") or 5)
    needs = {f"{kept + 1} checkpoints": checkpoint * (kept + 1), "the adapter": trainable * 4}
    if merge:
        needs["the merged model"] = weight_bytes
    needs["reserve"] = 1_000_000_000
    return needs


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and "embed" not in name and "lm_head" not in name


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
