"""Whether a training's base model can be trained on, as far as this machine can tell before it
starts: from a folder here, from the store, or from what configs/models.yml says of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.basemodel import files as model_files
from tunesmith.basemodel import judge, merging
from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.judge import Machine, Seen, Verdict, Wish
from tunesmith.basemodel.shape import shape_of
from tunesmith.core.documents import Config
from tunesmith.core.errors import UsageError
from tunesmith.job.system import gpu, resources
from tunesmith.plan.options import TrainOptions
from tunesmith.plan.target import Target
from tunesmith.project import Project

# Seconds for nvidia-smi, which hangs with a broken driver; without an answer nothing is judged by.
_ASKED = 3.0


def wish_of(
    values: Config,
    overrides: Collection[str],
    *,
    merge: bool,
    machine: Machine | None,
    before_preset: Mapping[str, object] | None = None,
) -> Wish:
    """Return what a run asks of its model.

    `before_preset` are the values of keys that a preset has changed: it tries by itself how many
    rows fit, so that its own are no measure. Raises UsageError for a training that no merge could
    take up, whatever its model is.
    """
    if merge and (fault := merging.by_settings(values)):
        raise UsageError(f"--then merge: {fault.text}", hint=fault.hint)
    return Wish(
        values={**values, **(before_preset or {})},
        insisted=frozenset(overrides),
        merge=merge,
        zero=judge.zero_stage_of(values.get("deepspeed")),
        machine=machine,
    )


def wish_of_training(
    target: Target,
    options: TrainOptions,
    overrides: Collection[str],
    values: Config,
    before_preset: Mapping[str, object],
) -> Wish:
    """Return what a training on a target asks of its model, on the GPUs that it takes there."""
    machine = target.machine()
    if machine and options.gpus:
        machine = machine.taking(options.gpus.count, options.gpus.ids)
    merge = "merge" in options.then
    return wish_of(values, overrides, merge=merge, machine=machine, before_preset=before_preset)


def this_machine() -> Machine:
    """Return the memory of this machine and its GPUs."""
    totals = [one.memory_total for one in gpu.ask(_ASKED)]
    return Machine(tuple(total for total in totals if total), resources.memory_limit())


def check_model(project: Project, name: str, wish: Wish) -> Verdict:
    """Return what is worth a word of a run's base model, and what its training takes.

    A folder of this machine has been proven (`models.settle`); one that is not here is looked at on
    its host, before its weights are read. The template of a model of configs/models.yml is right
    already (`build.read_config`). Nothing is fetched. Raises UsageError for a model that cannot be
    trained on.
    """
    known = project.base_models.get(name)
    if known:
        wish = replace(wish, insisted={*wish.insisted, "template"})
    folder = project.find(name)
    if folder.is_dir():
        code = bool(wish.values.get("trust_remote_code")) and "trust_remote_code" in wish.insisted
        return judge.judge(seen(name, folder, code=code), wish)
    for entry in model_store.entries(project.models, name):
        if entry.model.path.is_dir():
            return judge.judge(seen(name, entry.model.path), wish)
    shape = shape_of(known.config, known.size_bytes) if known and known.config else None
    if shape is None or not wish.values.get("do_train"):
        return Verdict()
    if wish.merge and known and (fault := merging.by_model(wish.values, known.config)):
        raise UsageError(f"{name}: {fault.text}", hint=fault.hint)
    estimate, notes = judge.require_memory(name, shape, wish)
    return Verdict(notes, estimate)


def seen(name: str, folder: Path, *, code: bool = False) -> Seen:
    """Return what is known of a folder of this machine before its weights are read."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return Seen(name, folder, names, model_files.weight_bytes(folder), code=code)
