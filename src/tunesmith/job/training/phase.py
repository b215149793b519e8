"""The train phase: LLaMA-Factory's own trainer with our callback."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core import isolated
from tunesmith.core.documents import Arguments
from tunesmith.core.files import locked, read_json, replacing, write_json
from tunesmith.core.patching import install
from tunesmith.job.inference import engine
from tunesmith.job.patches import imports
from tunesmith.job.patches.transformers import KEEP_BATCH_OF_CONFIG, KEEP_EPOCH_WHEN_SKIPPING
from tunesmith.job.run import checkpoints, seals
from tunesmith.job.run.codec import encode
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.journal import Reporter
from tunesmith.job.run.process import is_first_rank, rank_count
from tunesmith.job.run.schema import Limits, RunRequest
from tunesmith.job.system import resources
from tunesmith.job.training import dataset_cache, parser

# With fewer rows per process a fork costs more than it saves (measured: 1,000 rows take 0.65 s in
# one process and 9.4 s in sixteen on two cores).
ROWS_PER_WORKER = 5000

# Files of a checkpoint that a result does not have.
_RESUME_ONLY = ("optimizer", "scheduler", "rng_state", "scaler", checkpoints.MANIFEST)


def run(run_dir: Path, request: RunRequest, emit: Reporter) -> dict[str, Any]:
    """Train to the end, or until a stop was requested and a checkpoint is sealed.

    Continues from the newest sealed checkpoint in the output folder. Raises JobError for a failure
    with its own class; exceptions of LLaMA-Factory are passed on.
    """
    folder = RunFolder(run_dir)
    config = arguments(folder)
    if not config.get("do_train"):
        # LLaMA-Factory would end at once, and well.
        raise JobError("config", "`do_train`: it is not true", hint="write `do_train: true`")
    finished = _finished(config)
    processes = process_count()
    if finished is None and processes > 1 and "RANK" not in os.environ:
        _exec_ranks(run_dir, processes)
    limits = request.limits or Limits()
    if finished is not None:
        _take_result(finished, Path(config["output_dir"]))
        return _ended(folder, request, emit, Path(config["output_dir"]))
    keep = config.pop("save_total_limit", None)
    fit(config, request, emit)
    _tell_ranks(config, emit)

    imports.trim()
    scores = bool(config.get("predict_with_generate"))
    with imports.only(str(config.get("stage", "sft")), scores=scores):
        from llamafactory.train.tuner import run_exp
    parser.refuse(config)

    from tunesmith.job.data.cuts import CutReport
    from tunesmith.job.training.callback import RunCallback

    if not config.get("template") and config.get("stage", "sft") != "pt":
        # Read here once, so that one that cannot be read is told before the weights are loaded.
        engine.codec(engine.base_arguments(config))

    if request.preset == "fast":
        from tunesmith.job.training import fast_trainer

        fast_trainer.use(config, emit, functools.partial(_keep, folder))
    install(KEEP_BATCH_OF_CONFIG)
    callback = RunCallback(emit, keep=keep, disk_wait=limits.disk_wait_seconds)
    install(KEEP_EPOCH_WHEN_SKIPPING)
    dataset_cache.hasten(config)
    cuts = CutReport.of(config, emit)
    run_exp(config, callbacks=[callback, cuts])
    return {**_ended(folder, request, emit, Path(config["output_dir"])), **cuts.record()}


def fit(config: Arguments, request: RunRequest, emit: Callable[..., None]) -> None:
    """Adapt a config to this machine, in place, and let it reuse prepared rows."""
    for change in _fit_to_machine(config, request):
        config[change.key] = change.value
        emit("changed", what=change.key, to=change.value, **{"from": change.was}, why=change.why)
    view = dataset_cache.by_content(config)
    if view is None:
        return
    config["dataset_dir"] = view
    if config.get("overwrite_cache") and "overwrite_cache" not in request.overrides:
        config["overwrite_cache"] = False
        why = "prepared rows are cached by their content; changed rows are prepared again"
        emit("changed", what="overwrite_cache", to=False, **{"from": True}, why=why)


def fitted(config: Arguments, request: RunRequest) -> Arguments:
    """Return a config as `fit` makes it, without its view of the rows; nothing is told."""
    return config | {change.key: change.value for change in _fit_to_machine(config, request)}


def arguments(folder: RunFolder) -> Arguments:
    """Return the config of this attempt: with adjustments and the options for resuming.

    The job runner sets overwrite_output_dir and resume_from_checkpoint: LLaMA-Factory's own choice
    is the highest checkpoint number, complete or not, and its examples delete existing output.
    """
    config: Arguments = folder.settled(folder.config() | encode(folder.adjustments()))
    if config.get("do_train"):
        sealed = [
            (step, path)
            for step, path in checkpoints.folders(Path(config["output_dir"]))
            if (path / checkpoints.MANIFEST).is_file()
        ]
        config["resume_from_checkpoint"] = str(sealed[-1][1]) if sealed else None
        # True lets LLaMA-Factory accept the folder of an interrupted attempt and start a new log;
        # with a checkpoint to resume from, the log is continued.
        config["overwrite_output_dir"] = not sealed
    return config


def _keep(folder: RunFolder, change: Mapping[str, int]) -> None:
    """Record changed keys for later attempts of this run."""
    with locked(folder.adjustments_file):
        write_json(folder.adjustments_file, {**encode(folder.adjustments()), **change})


def _finished(config: Arguments) -> Path | None:
    """Return the checkpoint of a training that had reached its end, or None.

    An attempt can be killed after the last checkpoint but before the result is written.
    transformers 4.52 would train one step too many when resuming from it.
    """
    if not config.get("resume_from_checkpoint"):
        return None
    state = read_json(Path(config["resume_from_checkpoint"]) / "trainer_state.json")
    if state["global_step"] < state["max_steps"]:
        return None
    best = state.get("best_model_checkpoint")
    if config.get("load_best_model_at_end") and best:
        return Path(best)
    return Path(config["resume_from_checkpoint"])


def _take_result(checkpoint: Path, output: Path) -> None:
    """Write what the trainer writes at its end: the checkpoint's model, state and plot."""
    for file in checkpoint.iterdir():
        if file.is_file() and not file.name.startswith(_RESUME_ONLY):
            with replacing(output / file.name) as part:
                shutil.copyfile(file, part)

    from llamafactory.extras.ploting import plot_loss

    plot_loss(str(output), keys=["loss", "eval_loss"])


def process_count() -> int:
    """Return how many processes train: one a GPU, or what NPROC_PER_NODE says."""
    import torch

    have = int(torch.cuda.device_count())
    wanted = int(os.environ.get("NPROC_PER_NODE") or max(1, have))
    # On a machine without GPUs the processes share its processors.
    if wanted > have and (have or any(Path("/dev").glob("nvidia[0-9]*"))):
        raise JobError(
            "config",
            f"{wanted} processes were asked for, a GPU each, and {have} of the GPUs that "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')} names are here",
        )
    return wanted


def _exec_ranks(run_dir: Path, processes: int) -> None:
    """Become the process that starts the ranks: the same pid for the supervisor."""
    words = (str(run_dir), str(processes))
    argv = isolated.argv(
        sys.executable, "tunesmith.job.supervisor.ranks", *words, options=isolated.UNBUFFERED
    )
    os.execv(sys.executable, argv)  # noqa: S606 - an argv list built here, no shell


def _tell_ranks(config: Arguments, emit: Callable[..., None]) -> None:
    """Say how many rows a step has when several processes train, and let a CPU resume."""
    count = rank_count()
    if count == 1:
        return
    rows = int(config.get("per_device_train_batch_size") or 8)
    steps = int(config.get("gradient_accumulation_steps") or 1)
    emit(
        "note",
        phase="train",
        text=f"{count} processes x {rows} rows x {steps} accumulated = "
        f"{count * rows * steps} rows a step",
    )
    import torch

    if not torch.cuda.is_available():
        # transformers loads a rank's states to "cpu:0", a device that torch does not restore to.
        torch.serialization.register_package(5, lambda _: None, _restored_to_cpu)


def _restored_to_cpu(storage: object, location: str) -> object | None:
    return storage if location.startswith("cpu:") else None


@dataclass(frozen=True)
class Change:
    """A config key that gets another value on this machine."""

    key: str
    value: object
    was: object
    why: str = "what this machine can do"


def _fit_to_machine(config: Arguments, request: RunRequest) -> list[Change]:
    """Return changes for options that this machine cannot use, or runs faster with other values."""
    import torch

    changes: list[Change] = []
    if not torch.cuda.is_available():
        halves = [key for key in ("bf16", "fp16") if config.get(key)]
        if halves == ["bf16"] and resources.multiplies_bf16():
            # transformers refuses it without a GPU unless this is set.
            why = "keeps bf16, which this processor multiplies faster than float32"
            changes.append(Change("use_cpu", True, config.get("use_cpu"), why))
        else:
            changes += [Change(key, False, True) for key in halves]
    elif config.get("bf16") and torch.cuda.get_device_capability() < (8, 0):
        # bf16 is emulated there, and transformers refuses it.
        changes += [Change("bf16", False, True), Change("fp16", True, False)]
    if rank_count() > 1 and request.keep_batch:
        changes += _share_batch(config, rank_count())
    if rank_count() > 1 and config.get("average_tokens_across_devices") is None:
        why = "every token counts the same on all processes, as it does on one"
        changes.append(Change("average_tokens_across_devices", True, None, why))
    cpus = resources.cpu_count()
    if request.preset == "fast" and torch.cuda.is_available():
        if config.get("optim", "adamw_torch") == "adamw_torch":
            changes.append(Change("optim", "adamw_torch_fused", "adamw_torch"))
        if config.get("dataloader_num_workers") is None and cpus > 2:
            changes.append(Change("dataloader_num_workers", 2, 0))
    rows = sum(item.rows or 0 for item in request.data)
    workers = config.get("preprocessing_num_workers")
    if workers:
        most = min(int(workers), cpus)
        most = min(most, max(1, rows // ROWS_PER_WORKER)) if rows else most
        if most != workers:
            changes.append(
                Change("preprocessing_num_workers", None if most == 1 else most, workers)
            )
    loaders = config.get("dataloader_num_workers")
    if loaders and int(loaders) > cpus:
        changes.append(Change("dataloader_num_workers", cpus, loaders))
    return changes


def _share_batch(config: Arguments, processes: int) -> list[Change]:
    """Return the change that keeps the rows of a step on so many processes.

    Raises JobError where the accumulated steps cannot be shared evenly.
    """
    steps = int(config.get("gradient_accumulation_steps") or 1)
    if steps % processes:
        raise JobError(
            "config",
            f"--keep-batch: gradient_accumulation_steps {steps} cannot be shared by {processes} "
            f"processes; `gradient_accumulation_steps={processes}` can, or leave --keep-batch out",
        )
    why = f"{processes} processes share the rows of a step (--keep-batch)"
    return [Change("gradient_accumulation_steps", steps // processes, steps, why)]


def _ended(
    folder: RunFolder, request: RunRequest, emit: Callable[..., None], output: Path
) -> dict[str, Any]:
    """Make the merge bundle while LLaMA-Factory is loaded, and return the summary."""
    from tunesmith.job.merge import bundle

    sealed = _sealed(folder)
    seconds = bundle.after_training(folder.path, request, emit)
    return {**_result(output, sealed), "bundle_seconds": seconds}


def _sealed(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Seal the result in the process that wrote it; return the seals."""
    if not is_first_rank():
        return {}
    return seals.seal(folder.path, "train", ("output",))


def _result(output: Path, sealed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the training's result files with size and sha256, and its metrics."""
    names = [name for name in sealed if name.endswith(".safetensors")]
    files = {
        Path(name).name: {key: sealed[name][key] for key in ("size", "sha256")}
        for name in names
        if name.count("/") == 1
    }
    metrics_file = output / "train_results.json"
    metrics = read_json(metrics_file) if metrics_file.exists() else {}
    return {"files": files, "metrics": metrics}
