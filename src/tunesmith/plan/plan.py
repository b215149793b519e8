"""Config and target in, plan out: pure, so that a plan can be shown, tested and compared.

A plan says everything that will be done: the run folder's files, the exact config
LLaMA-Factory gets, the environment, the command. Nothing here reads or writes a file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from tunesmith.core import formats, isolated
from tunesmith.job.run.schema import RunRequest
from tunesmith.plan.config import Config

# Keys that name a file or folder; a worker runs in the run folder, so they must be absolute.
PATH_KEYS = ("dataset_dir", "tokenized_path", "media_dir", "deepspeed", "cache_dir")

# Greedy answers before and after: short ones, since what is wanted is the comparison.
EVALUATION = {"max_new_tokens": 64, "held_out_answers": 8, "batch_size": 32}


@dataclass(frozen=True)
class Owned:
    """A config key the job runner decides, and why; `was` is what the config said."""

    key: str
    value: Any
    was: Any
    why: str


@dataclass(frozen=True)
class Input:
    """A file of this machine that a run reads on another one.

    `name` is where it will lie, relative to RUN/inputs.
    """

    name: str
    source: Path


@dataclass(frozen=True)
class Place:
    """Where a run lives on its target: folder, interpreter, and the variables of jobs.

    The paths are the target's own; they may name nothing on this machine.
    """

    run: PurePath
    python: PurePath
    env: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What will be done for one job. `config` is None where no training happens."""

    place: Place
    phases: tuple[str, ...]
    request: RunRequest
    config: Mapping[str, Any] | None = None
    owned: tuple[Owned, ...] = ()
    needs: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.place.run.name

    @property
    def argv(self) -> tuple[str, ...]:
        """The command that starts the job on its target."""
        words = ("start", str(self.place.run), *self.phases, "--cause", "user")
        return tuple(isolated.argv(self.place.python, "tunesmith.job", *words))

    def render(self) -> str:
        """Return the plan as a person reads it."""
        lines = [f"run      {self.place.run}", f"phases   {' -> '.join(self.phases)}"]
        lines += [f"command  {shlex.join(self.argv)}"]
        lines += ["env", *(f"  {key}={value}" for key, value in sorted(self.place.env.items()))]
        if self.config is not None:
            body = yaml.safe_dump(dict(self.config), allow_unicode=True, sort_keys=True)
            lines += ["config.yaml", *(f"  {line}" for line in body.splitlines())]
        if self.owned:
            lines.append("decided by the job runner")
            lines += [f"  {o.key}: {o.value} (was {o.was}): {o.why}" for o in self.owned]
        if self.needs:
            lines.append("disk")
            lines += [f"  {formats.size(size):>9}  {what}" for what, size in self.needs.items()]
            lines.append(f"  {formats.size(sum(self.needs.values())):>9}  together")
        if self.inputs:
            lines.append("uploaded where they have changed")
            lines += [f"  {item.source} -> inputs/{item.name}" for item in self.inputs]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)


def own_keys(
    config: Config, place: Place, model_path: str, output: str = "output"
) -> tuple[dict[str, Any], list[Owned]]:
    """Return the config a worker gets, and each key that differs from what was written.

    `output` is the name of the folder for results in the run's folder.
    """
    values = dict(config.values)
    owned: list[Owned] = []

    def own(key: str, value: Any, why: str) -> None:
        if key not in values or values[key] != value:
            owned.append(Owned(key, value, values.get(key), why))
        values[key] = value

    own("model_name_or_path", model_path, "the verified folder")
    if "output_dir" not in config.overrides:
        own("output_dir", str(place.run / output), "a run keeps everything in its own folder")
    elif values.get("output_dir"):
        own("output_dir", str(place.run / str(values["output_dir"])), "below the run's folder")
    for key in ("overwrite_output_dir", "resume_from_checkpoint"):
        if values.pop(key, None) is not None:
            why = "decided at each start: continue from the newest sealed checkpoint"
            owned.append(Owned(key, "by the job runner", config.get(key), why))
    if values.get("trust_remote_code") and not config.overrides.get("trust_remote_code"):
        own("trust_remote_code", False, "code from a hub runs only on `trust_remote_code=true`")
    if values.get("save_only_model"):
        own("save_only_model", False, "such checkpoints cannot be resumed")
    own("logging_nan_inf_filter", False, "a loss of NaN must be seen, not averaged away")
    if "report_to" not in values:
        own("report_to", "none", "no tracker unless you name one")
    if "include_num_input_tokens_seen" not in values:
        own("include_num_input_tokens_seen", True, "for the throughput")
    if "disable_tqdm" not in values:
        own("disable_tqdm", True, "the log is a file; progress is shown by tunesmith")
    return values, owned


def absolute_paths(values: dict[str, Any], find: Any) -> None:
    """Make the path keys of `values` absolute, in place, by `find(path) -> Path`."""
    for key in PATH_KEYS:
        value = values.get(key)
        # "ONLINE" and "REMOTE:repo" are dataset_dir values that name no folder.
        if isinstance(value, str) and not value.startswith(("ONLINE", "REMOTE:")):
            values[key] = str(find(value))


def train_phases(config: Config, prompts: Sequence[Any], *, evaluate: bool) -> tuple[str, ...]:
    """Return the phases of a training run: measured before and after where that can be done."""
    held_out = bool(config.get("eval_dataset")) or float(config.get("val_size") or 0) > 0
    measurable = config.get("stage", "sft") == "sft" and (held_out or bool(prompts))
    if evaluate and measurable and config.get("do_train"):
        return ("before", "train", "after")
    return ("train",)


def disk_needs(
    config: Config,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
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
