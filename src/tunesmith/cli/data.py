"""The verbs on data: check, register, split, preview. Each runs one function and prints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from tunesmith.basemodel import files as model_files
from tunesmith.cli.console import console, say
from tunesmith.core.errors import UsageError
from tunesmith.core.printable import printable
from tunesmith.dataset import histogram, registry, replay_report
from tunesmith.dataset.cost import Gpu, estimate, load_gpu, model_of, price_of
from tunesmith.dataset.entry import Entry
from tunesmith.dataset.overlap import overlap
from tunesmith.dataset.reading import Tables
from tunesmith.dataset.report import DatasetReport
from tunesmith.dataset.split import split
from tunesmith.dataset.training_job import run_job
from tunesmith.plan import build
from tunesmith.plan.build import tables_here
from tunesmith.plan.config import Config
from tunesmith.plan.plan import absolute_paths
from tunesmith.project import Project

_SECONDS = 5.0  # in a pipe: the time between two lines of progress


@dataclass(frozen=True)
class Asked:
    """What `data.check` was asked: what to check, for which config, on which GPU."""

    keys: str = ""
    dataset_dir: str = ""
    file: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    gpu: str = ""
    price: str = ""
    picture: str = ""
    mirror: str = "default"


def check(root: Path, asked: Asked) -> None:
    """Print what was found in data sets, one file, or a config's data. Raises at errors."""
    project = Project.at(root)
    named = [
        flag
        for flag, value in (
            ("--file", asked.file),
            ("--dataset", asked.keys),
            ("--config", asked.config),
        )
        if value
    ]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} both name data to check; give one of them")
    if not asked.config and (asked.gpu or asked.price or asked.picture or asked.overrides):
        raise UsageError("--gpu, --price, --picture and key=value words need a --config")
    if asked.config:
        _check_config(project, asked)
        return
    tables = tables_here(project)
    with _bar("rows") as progress:
        if asked.file:
            path = project.find(asked.file)
            reports: Sequence[DatasetReport] = (
                registry.check_unregistered(path, tables=tables, thorough=True, progress=progress),
            )
        else:
            folder = project.find(asked.dataset_dir or "data")
            names = asked.keys or ",".join(registry.load_registry(folder))
            reports = registry.check_registered(
                folder, names, tables=tables, thorough=True, progress=progress
            )
    _tell(reports)
    _refuse(reports)


def register(
    root: Path, file: str, key: str, dataset_dir: str, *, replace: bool, dry: bool
) -> None:
    """Add a checked file or folder to dataset_info.json."""
    project = Project.at(root)
    folder, path, tables = project.find(dataset_dir), project.find(file), tables_here(project)
    if dry:
        found = registry.check_unregistered(path, tables=tables)
        say(f"would register {key}: {path} ({found.rows} rows, {found.error_count} errors)")
        return
    entry = registry.register(folder, key, path, replace=replace, tables=tables)
    say(f"{folder / registry.REGISTRY}: {key} -> {entry.file_name} ({entry.formatting})")


def split_data(
    root: Path,
    key: str,
    dataset_dir: str,
    *,
    share: str,
    seed: int,
    replace: bool,
    dry: bool,
) -> None:
    """Write training and validation rows of a data set, and their entries."""
    project = Project.at(root)
    folder = project.find(dataset_dir)
    try:
        held_out = float(share)
    except ValueError:
        raise UsageError(f"--share {share!r} is no number; write it as in --share 0.1") from None
    made = split(
        folder, key, held_out, seed, replace_files=replace, tables=tables_here(project), dry=dry
    )
    verb = "would write" if dry else "wrote" if made.changed else "unchanged"
    for part in (made.train, made.validation):
        say(f"{verb}: {part.entry.key} -> {part.file} ({part.rows} rows)")
    if made.joined:
        say(f"{made.joined} rows stay beside one they are alike to")
    say("in the config, in place of val_size:")
    say(f"  dataset: {made.train.entry.key}")
    say(f"  eval_dataset: {made.validation.entry.key}")


def preview(
    root: Path, config: str, overrides: Sequence[str], *, rows: int, first: int, mirror: str
) -> None:
    """Print rows as the model will see them, trained tokens marked."""
    if rows < 1 or first < 1:
        raise UsageError("--rows and --first count from 1")
    project = Project.at(root)
    values = _config_values(project, build.read_config(project, Path(config), overrides), mirror)
    request = {"config": values, "rows": rows, "first": first}
    found = run_job(*_job(project), "tunesmith.job.data.preview", request)["rows"]
    for row in found:
        say(_head(row))
        if console.is_terminal:
            text = Text()
            for piece in row["pieces"]:
                text.append(
                    printable(piece["text"]), style="bold green" if piece["trained"] else "dim"
                )
            console.print(text, soft_wrap=True)
        else:
            marked = ("[[{}]]" if piece["trained"] else "{}" for piece in row["pieces"])
            texts = (piece["text"] for piece in row["pieces"])
            say("".join(mark.format(text) for mark, text in zip(marked, texts, strict=True)))
    mark = "bold green" if console.is_terminal else "between [[ and ]]"
    say(f"\ntrained tokens are {mark}; the rest is read only")


def _head(row: Mapping[str, Any]) -> str:
    name = f"--- row {row['row']} of {row['dataset']}"
    if row["dropped"]:
        return f"{name}: dropped by LLaMA-Factory; `inv data.check` says why"
    cut = f", {row['cut']} more are cut off" if row["cut"] else ""
    return f"{name}: {row['tokens']} tokens, {row['trained']} trained{cut}"


def _check_config(project: Project, asked: Asked) -> None:
    """The data of a config: the static rules, then LLaMA-Factory's own work on each row."""
    price = price_of(asked.price)
    if price is not None and not asked.gpu:
        raise UsageError("--price needs the --gpu it is for")
    gpu = load_gpu(project.root / "configs" / "gpus.yml", asked.gpu) if asked.gpu else None
    config = build.read_config(project, Path(asked.config), asked.overrides)
    folder = str(config.get("dataset_dir") or "data")
    listed = [str(config.get(key)) for key in ("dataset", "eval_dataset") if config.get(key)]
    names = list(dict.fromkeys(name.strip() for name in ",".join(listed).split(",")))
    if not listed:
        raise UsageError(f"{config.file}: names no data set; write dataset: KEY")
    tables = tables_here(project)
    reports: Sequence[DatasetReport] = ()
    entries: list[tuple[Entry, Path]] = []
    if not folder.startswith(("ONLINE", "REMOTE:")):
        place = project.find(folder)
        stage = str(config.get("stage", "sft"))
        with _bar("rows") as progress:
            reports = registry.check_registered(
                place, ",".join(names), stage, tables=tables, thorough=True, progress=progress
            )
        local = [e for e in registry.resolve(place, ",".join(names)) if not e.remote]
        entries = [(entry, entry.path(place)) for entry in local]
        _tell(reports)
        if any(report.rows is not None and not report.kept for report in reports):
            _refuse(reports)
    values = _config_values(project, config, asked.mirror)
    made = project.folder("data")
    listing = made / f"{config.stem}.rows.jsonl"
    with _bar("rows encoded") as progress:
        request = {"config": values, "workers": os.cpu_count() or 1, "rows": str(listing)}
        found = run_job(*_job(project), "tunesmith.job.data.replay", request, progress)
    for line in replay_report.lines(found):
        say(line)
    for report in reports:
        used = found["datasets"].get(report.key, {}).get("rows")
        if used is not None and report.rows is not None and used < report.rows:
            say(f"{report.key}: {report.rows - used} rows are not used (max_samples, num_samples)")
    _tell_overlap(found, entries, tables)
    if gpu is not None:
        _tell_cost(found, values, gpu, price)
    lengths = replay_report.lengths_of(found)
    if lengths:
        file = Path(asked.picture) if asked.picture else made / f"{config.stem}.png"
        histogram.picture(lengths, found["cutoff_len"], f"{config.stem}: {', '.join(names)}", file)
        say(f"picture: {file}")
    if listing.stat().st_size:
        say(f"every row that is not simply kept: {listing}")
    _refuse(reports)


def _tell_overlap(
    found: Mapping[str, Any], entries: Sequence[tuple[Entry, Path]], tables: Tables | None
) -> None:
    both = sorted(set(found["train"]) & set(found["eval"]))
    if both:
        say(f"validation: {', '.join(both)} is trained on too: its loss measures memory")
    if both or any("num_samples" in entry.other for entry, _ in entries):
        return  # num_samples draws rows: their numbers are not those of the file
    held: dict[str, frozenset[int] | None] = dict.fromkeys(found["eval"])
    chosen: dict[str, set[int]] = {}
    for name, row in found["validation"]:
        chosen.setdefault(name, set()).add(row)
    held |= {name: frozenset(rows) for name, rows in chosen.items()}
    if held and entries:
        seen = overlap(entries, held, tables)
        for line in replay_report.overlap_lines(seen, by_split=bool(chosen)):
            say(line)


def _tell_cost(
    found: Mapping[str, Any], values: Mapping[str, Any], gpu: Gpu, price: float | None
) -> None:
    folder = Path(str(values["model_name_or_path"]))
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = model_of(described, model_files.tensor_shapes(folder))
    for line in replay_report.cost_lines(estimate(found, model, values, gpu, price), gpu.name):
        say(line)


def _config_values(project: Project, config: Config, mirror: str) -> dict[str, Any]:
    """Return a config's values with absolute paths and the base model's folder."""
    name = str(config.get("model_name_or_path"))
    model = build.fetch_model(project, name, lambda _: None, mirror=mirror)
    values = {**config.values, "model_name_or_path": str(model.path)}
    values.setdefault("dataset_dir", "data")  # LLaMA-Factory's own default
    absolute_paths(values, project.find)
    return values


def _job(project: Project) -> tuple[Path, dict[str, str]]:
    environment = project.environment()
    if not environment.current():
        raise UsageError(
            f"{environment.path}: no finished training environment; `inv stack.install` makes it"
        )
    variables = {**project.stack.variables, "HF_HOME": str(project.hf_home)}
    return environment.python, variables


def _tell(reports: Sequence[DatasetReport]) -> None:
    for found in reports:
        rows = "not looked at" if found.rows is None else f"{found.rows} rows, {found.kept} kept"
        name = f"{found.key}: {found.file}" if found.key else found.file
        say(f"{name}: {rows}, {found.error_count} errors")
        for line in found.lines():
            say(f"  {line}")
        scripts = found.looks.get("scripts", {})
        total = sum(scripts.values())
        if total:
            shares = ", ".join(f"{name} {count / total:.0%}" for name, count in scripts.items())
            again, near = found.looks["duplicates"], found.looks["near_duplicates"]
            say(f"  answers: {shares}; {again} duplicates, {near} near-duplicates")


def _refuse(reports: Sequence[DatasetReport]) -> None:
    faulty = [found.key or found.file for found in reports if found.errors]
    if faulty:
        raise UsageError(f"data with errors: {', '.join(faulty)}; each fault is named above")


@contextmanager
def _bar(what: str) -> Iterator[Any]:
    """Yield progress(done, total): a bar on a terminal, in a pipe a line from time to time."""
    if not console.is_terminal:
        said_at = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal said_at
            if time.monotonic() - said_at >= _SECONDS:
                said_at = time.monotonic()
                say(f"{what}: {done / max(total, 1):.0%}")

        yield tell
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield move
