"""`inv data.check`: data sets, one file, or the data of a config, checked row by row."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.basemodel import files as model_files
from tunesmith.cli.base_model import fetching
from tunesmith.cli.console import moving, say
from tunesmith.core import documents, formats
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.dataset import histogram, mix, registry, replay_report
from tunesmith.dataset.cost import Gpu, estimate, load_gpu, model_of, price_of, steps_of
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.overlap import overlap
from tunesmith.dataset.reading import Tables
from tunesmith.dataset.report import DatasetReport
from tunesmith.dataset.training_job import run_job
from tunesmith.plan import build, hub_data, rows
from tunesmith.plan.build import tables_here
from tunesmith.plan.config import Config
from tunesmith.plan.plan import absolute_paths
from tunesmith.project import Project


@dataclass(frozen=True)
class DataCheckOptions:
    """What to check, for which config, on which GPU."""

    keys: str = ""
    dataset_dir: str = ""
    file: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    gpu: str = ""
    price: str = ""
    picture: str = ""
    mirror: str = "default"


def check(project: Project, options: DataCheckOptions) -> None:
    """Print what was found in data sets, one file, or a config's data. Raises at errors."""
    named = [
        flag
        for flag, value in (
            ("--file", options.file),
            ("--dataset", options.keys),
            ("--config", options.config),
        )
        if value
    ]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} both name data to check", hint="give one of them")
    if not options.config and (
        options.gpu or options.price or options.picture or options.overrides
    ):
        raise UsageError("--gpu, --price, --picture and key=value words need a --config")
    if options.config:
        _check_config(project, options)
        return
    tables = tables_here(project)
    with moving("reading") as progress:
        if options.file:
            path = project.find(options.file)
            reports: Sequence[DatasetReport] = (
                registry.check_unregistered(path, tables=tables, thorough=True, progress=progress),
            )
        else:
            folder = project.find(options.dataset_dir or "data")
            names = options.keys or ",".join(registry.load_registry(folder))
            reports = registry.check_registered(
                folder, names, tables=tables, thorough=True, progress=progress
            )
    _show_reports(reports)
    _raise_on_errors(reports)


def _check_config(project: Project, options: DataCheckOptions) -> None:
    """The data of a config: the static rules, then LLaMA-Factory's own work on each row."""
    price = price_of(options.price)
    if price is not None and not options.gpu:
        raise UsageError("--price needs the --gpu it is for")
    gpu = load_gpu(project.root / "configs" / "gpus.yml", options.gpu) if options.gpu else None
    config = build.read_config(project, Path(options.config), options.overrides)
    folder = str(config.get("dataset_dir") or "data")
    listed = [str(config.get(key)) for key in ("dataset", "eval_dataset") if config.get(key)]
    names = list(dict.fromkeys(name.strip() for name in ",".join(listed).split(",")))
    if not listed:
        raise UsageError(f"{config.file}: names no data set", hint="write `dataset: KEY`")
    tables = tables_here(project)
    reports: Sequence[DatasetReport] = ()
    entries: list[tuple[Entry, Path]] = []
    if not folder.startswith(("ONLINE", "REMOTE:")):
        place = project.find(folder)
        stage = str(config.get("stage", "sft"))
        found = {**config.values, "media_dir": project.find(str(config.get("media_dir") or folder))}
        media = build.media_place(found, place)
        with moving("reading") as progress:
            reports = registry.check_registered(
                place,
                ",".join(names),
                stage,
                tables=tables,
                thorough=True,
                media=media,
                progress=progress,
            )
        local = [e for e in registry.resolve(place, ",".join(names)) if not e.remote]
        entries = [(entry, entry.path(place)) for entry in local]
        _show_reports(reports)
        if any(report.rows is not None and not report.kept for report in reports):
            _raise_on_errors(reports)
        # A mixture at which LLaMA-Factory stops ends here.
        rows.planned({**config.values, "dataset_dir": str(place)}, reports)
    python, environment = training_python(project, config.values, options.mirror)
    values = config_values(project, config, options.mirror)
    made = project.folder("data")
    listing = made / f"{config.stem}.rows.jsonl"
    with moving("rows encoded", formats.count) as progress:
        request = {"config": values, "workers": os.cpu_count() or 1, "rows": str(listing)}
        replayed = run_job(python, environment, "tunesmith.job.data.replay", request, progress)
    for line in replay_report.lines(replayed):
        say(line)
    for line in mix.warmup_warnings(steps_of(replayed), values):
        say(line)
    for report in reports:
        used = replayed["datasets"].get(report.key, {}).get("rows")
        if used is not None and report.rows is not None and used < report.rows:
            left = formats.count(report.rows - used)
            say(f"{report.key}: {left} rows are not used (max_samples, num_samples)")
    _show_overlap(replayed, entries, tables)
    if gpu is not None:
        _show_cost(replayed, values, gpu, price)
    lengths = replay_report.lengths_of(replayed)
    if lengths:
        file = Path(options.picture) if options.picture else made / f"{config.stem}.png"
        histogram.picture(
            lengths, replayed["cutoff_len"], f"{config.stem}: {', '.join(names)}", file
        )
        say(f"picture: {file}")
    if listing.stat().st_size:
        say(f"every row that is not simply kept: {listing}")
    _raise_on_errors(reports)


def _show_overlap(
    replayed: Mapping[str, Any], entries: Sequence[tuple[Entry, Path]], tables: Tables | None
) -> None:
    both = sorted(set(replayed["train"]) & set(replayed["eval"]))
    if both:
        say(f"validation: {', '.join(both)} is trained on too: its loss measures memory")
    if both or any("num_samples" in entry.other for entry, _ in entries):
        return  # num_samples draws rows: their numbers are not those of the file
    held: dict[str, frozenset[int] | None] = dict.fromkeys(replayed["eval"])
    chosen: dict[str, set[int]] = {}
    for name, row in replayed["validation"]:
        chosen.setdefault(name, set()).add(row)
    held |= {name: frozenset(rows) for name, rows in chosen.items()}
    if held and entries:
        seen = overlap(entries, held, tables)
        for line in replay_report.overlap_lines(seen, by_split=bool(chosen)):
            say(line)


def _show_cost(
    replayed: JsonObject, values: documents.Config, gpu: Gpu, price: float | None
) -> None:
    folder = Path(str(values["model_name_or_path"]))
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = model_of(described, model_files.tensor_shapes(folder))
    for line in replay_report.cost_lines(estimate(replayed, model, values, gpu, price), gpu.name):
        say(line)


def config_values(project: Project, config: Config, mirror: str) -> dict[str, Any]:
    """Return a config's values with absolute paths and the base model's folder."""
    name = str(config.get("model_name_or_path"))
    with fetching() as show:
        model = build.fetch_model(project, name, show, mirror=mirror)
    values = {**config.values, "model_name_or_path": str(model.path)}
    values.setdefault("dataset_dir", "data")  # LLaMA-Factory's own default
    absolute_paths(values, project.find)
    return values


def training_python(
    project: Project, values: documents.Config, mirror: str
) -> tuple[Path, dict[str, str]]:
    """Return the interpreter of the training environment, and the variables of a job in it.

    Raises UsageError where there is none, or no way to a data set of the config.
    """
    environment = project.environment()
    if not environment.current():
        raise UsageError(
            f"{environment.path}: no finished training environment",
            hint="`inv stack.install` makes it",
        )
    found = {**values, "dataset_dir": str(values.get("dataset_dir") or "data")}
    absolute_paths(found, project.find)
    remote = hub_data.remote_entries(found)
    hub_data.check(remote, build.installed(project))
    network = hub_data.environment(remote, project.mirror(mirror))
    return environment.python, {
        **project.stack.variables,
        "HF_HOME": str(project.hf_home),
        **network,
    }


def _show_reports(reports: Sequence[DatasetReport]) -> None:
    for report in reports:
        rows = "not looked at"
        if report.rows is not None:
            rows = f"{formats.count(report.rows)} rows, {formats.count(report.kept)} kept"
        name = f"{report.key}: {report.file}" if report.key else report.file
        say(f"{name}: {rows}, {report.error_count} errors")
        for line in report.lines():
            say(f"  {line}")
        scripts = report.looks.get("scripts", {})
        total = sum(scripts.values())
        if total:
            shares = ", ".join(f"{name} {count / total:.0%}" for name, count in scripts.items())
            again, near = report.looks["duplicates"], report.looks["near_duplicates"]
            say(f"  answers: {shares}; {again} duplicates, {near} near-duplicates")


def _raise_on_errors(reports: Sequence[DatasetReport]) -> None:
    faulty = [report.key or report.file for report in reports if report.errors]
    if faulty:
        raise UsageError(f"data with errors: {', '.join(faulty)}", hint="each error is named above")
