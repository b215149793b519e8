"""The fetch phase: downloads the base model in run.json's `fetch` to the run's machine.

Standard library and yaml only. A verified model needs no network, so a resumed run passes this
phase at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from tunesmith.basemodel import fetch as model_fetch
from tunesmith.basemodel.catalogue import load_models
from tunesmith.basemodel.judge import Machine, Seen, Wish, require_trainable, zero_stage_of
from tunesmith.basemodel.judge import judge as judge_model
from tunesmith.basemodel.kinds import Kind
from tunesmith.core import formats
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import replacing, write_text
from tunesmith.core.mirrors import load_mirror
from tunesmith.job.merge.adapter import check_start
from tunesmith.job.run import inputs, seals
from tunesmith.job.run.codec import encode
from tunesmith.job.run.config import starting_adapters
from tunesmith.job.run.downloads import named_config, with_origin
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import (
    Download,
    FetchSpec,
    FileRecord,
    ModelRef,
    RunRequest,
    Values,
)
from tunesmith.job.system import gpu, resources

# Kinds of fetch.NoSourceError that may disappear within a minute.
_PASSING = {"unreachable", "cut", "busy", "broken"}
_EVENT_SECONDS = 1.0
# Keys of the fast preset that decide how much memory a step takes.
_TRIED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "disable_gradient_checkpointing",
)


def run(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> JsonObject:
    """Fetch and prove the base model and further ones; write into run.json and config where they
    lie.

    Raises JobError of class `model` with each source's reason, and of class `disk_full` if it did
    not fit.
    """
    spec = request.fetch
    if spec is None:
        raise UsageError(f"run {run_dir.name}: its request does not say what to fetch")
    if "HF_HOME" not in os.environ:
        raise UsageError(f"run {run_dir.name}: HF_HOME is not set; base models go there")
    models = load_models(_configs(spec) / "models.yml")
    wish = _wish(RunFolder(run_dir), request, ("template",) if spec.name in models else ())

    def judge(seen: Seen) -> None:
        verdict = judge_model(seen, wish)
        for note in verdict.notes:
            emit("note", phase="fetch", text=note)
        if verdict.estimate:
            taken = formats.size(verdict.estimate.total)
            emit("note", phase="fetch", text=f"memory: the training takes about {taken}")

    code = bool(wish.values.get("trust_remote_code"))
    hf_home = Path(os.environ["HF_HOME"])
    model = _fetch(spec, hf_home, emit, remote_code=code, judge=judge)
    others = [
        (item, _fetch(_order(spec, item), hf_home, emit, remote_code=code, kind=item.kind))
        for item in request.downloads
    ]
    _write(RunFolder(run_dir), request, model, others)
    return {"path": str(model.path), "source": model.source, "fetched": model.fetched}


def _wish(run: RunFolder, request: RunRequest, known: tuple[str, ...]) -> Wish:
    """Return what the run asks of its base model, and the memory that is here for it.

    `known` are keys that were compared with configs/models.yml when the run was planned.
    """
    config = request.predict
    if config is None and run.config_file.exists():
        config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    values = dict(config or {})
    if request.preset == "fast":
        # It tries by itself how many rows fit: what was written is the measure.
        values |= {key.key: key.was for key in request.owned if key.key in _TRIED}
    machine = Machine(
        tuple(one.memory_total for one in gpu.ask() if one.memory_total),
        resources.memory_limit(),
    )
    if request.gpus:
        machine = machine.taking(request.gpus.count, request.gpus.ids)
    return Wish(
        values=values,
        insisted=frozenset((*request.overrides, *known)),
        merge="merge" in (request.phases or ()),
        zero=zero_stage_of(values.get("deepspeed")),
        machine=machine,
    )


def _order(spec: FetchSpec, item: Download) -> FetchSpec:
    """Return how another model comes: the way of the base model, at its hub's newest revision."""
    return replace(spec, name=item.name, revision=None)


def _fetch(
    spec: FetchSpec,
    hf_home: Path,
    emit: Callable[..., None],
    *,
    remote_code: bool,
    judge: model_fetch.Judge = require_trainable,
    kind: Kind = "model",
) -> model_fetch.ModelFolder:
    if spec.programs:
        # The folder of uv on a host, which verifies wheels.
        os.environ["PATH"] = f"{spec.programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    configs = _configs(spec)
    try:
        return model_fetch.fetch(
            spec.name,
            revision=spec.revision,
            models=load_models(configs / "models.yml"),
            mirror=load_mirror(spec.mirror, configs / "mirrors"),
            hf_home=hf_home,
            store=Path(spec.store),
            convert=functools.partial(model_fetch.convert_with, Path(sys.executable)),
            allow_pickle=spec.allow_pickle,
            remote_code=remote_code,
            judge=judge,
            kind=kind,
            progress=_ProgressReporter(emit),
        )
    except model_fetch.NoSourceError as error:
        failure = "disk_full" if "disk" in error.kinds else "model"
        retry = bool(error.kinds) and error.kinds <= _PASSING
        raise JobError(failure, error.line, error.detail, retry=retry) from None
    except TunesmithError as error:
        raise JobError("model", error.line, error.detail) from None


def _configs(spec: FetchSpec) -> Path:
    return Path(spec.configs) if spec.configs else model_fetch.CONFIGS


class _ProgressReporter:
    """Reports a fetch's progress as events, at a rate that a log can store."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit
        self._text = ""
        self._what = ""
        self._at = 0.0
        self._whole = False

    def __call__(self, progress: model_fetch.Progress) -> None:
        if progress.total is None:
            if progress.text != self._text:
                self._emit("note", phase="fetch", text=progress.text)
            self._text = progress.text
            return
        now = time.monotonic()
        news = progress.what != self._what or (progress.done >= progress.total) > self._whole
        if not news and now - self._at < _EVENT_SECONDS:
            return
        self._what, self._at = progress.what, now
        self._whole = progress.done >= progress.total
        unit = "MB checked" if progress.what == "verify" else "MB"
        done, total = round(progress.done / 1e6), max(1, round(progress.total / 1e6))
        self._emit("progress", phase="fetch", done=done, total=total, unit=unit)


Others = Sequence[tuple[Download, model_fetch.ModelFolder]]


def _write(
    run: RunFolder, request: RunRequest, model: model_fetch.ModelFolder, others: Others
) -> None:
    record = ModelRef(
        name=request.model.name if request.model and request.model.name else model.name,
        path=str(model.path),
        source=model.source,
        revision=model.revision,
        files={n: FileRecord(r.size, r.sha256) for n, r in model.files.items()},
    )
    named = [f.name for f in (run.request_file, run.config_file) if f.exists()]
    with seals.rewriting(run.path, "fetch", *named):
        changed = _write_both(run, request, record, others)
    inputs.remember_model(run.path, record)
    inputs.remember(run.path, changed, changed.inputs, _unread(changed, others))


def _write_both(
    run: RunFolder, request: RunRequest, record: ModelRef, others: Others
) -> RunRequest:
    changed = replace(request, model=record)
    if run.config_file.exists():
        config = run.config()
        config["model_name_or_path"] = record.path
        for item, model in others:
            config = named_config(request, config, item, model.path)
        _check_adapters(config)
        body = yaml.safe_dump(config, allow_unicode=True, sort_keys=True)
        write_text(run.config_file, body)
    if request.predict is not None:
        predict = {**request.predict, "model_name_or_path": record.path}
        for item, model in others:
            predict = named_config(request, predict, item, model.path)
        if inputs.TRAIN not in request.inputs:
            _check_adapters(predict)
        changed = replace(changed, predict=predict)
    for item, model in others:
        changed = inputs.with_files(with_origin(changed, item, model), item, model)
    _replace_request(run.request_file, changed)
    return changed


def _check_adapters(config: Values) -> None:
    """Raise JobError where an adapter to start from is of another base model."""
    if not (adapters := starting_adapters(config)):
        return
    try:
        check_start(Path(str(config["model_name_or_path"])), map(Path, adapters))
    except UsageError as error:
        raise JobError("model", error.line, error.detail) from None


def _unread(request: RunRequest, others: Others) -> list[Path]:
    """Return the inputs that were not read here just now."""
    read = {model.path / name for _, model in others for name in model.files}
    names = {name for part in request.inputs.values() for name in part.files}
    return [path for path in map(Path, names) if path not in read]


def _replace_request(file: Path, request: RunRequest) -> None:
    """Write run.json with its old time stamp, which orders runs by their request."""
    stat = file.stat()
    with replacing(file) as part:
        body = json.dumps(encode(request), ensure_ascii=False, indent=2) + "\n"
        part.write_text(body, encoding="utf-8")
        os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))
