"""Which files of this machine a run reads on another one, and where they lie there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel import kinds
from tunesmith.core.documents import Arguments
from tunesmith.core.errors import UsageError
from tunesmith.dataset.registry import REGISTRY
from tunesmith.dataset.report import DatasetReport
from tunesmith.job.run.config import put_name
from tunesmith.plan.models import Named
from tunesmith.plan.plan import PATH_KEYS, Input, Link
from tunesmith.plan.target import Target


@dataclass(frozen=True)
class Staged:
    """What goes to a run's inputs: files of this machine, and results of runs that lie there."""

    inputs: tuple[Input, ...] = ()
    links: tuple[Link, ...] = ()


def stage_inputs(
    target: Target,
    run_id: str,
    values: Arguments,
    reports: Sequence[DatasetReport],
    named: Sequence[Named] = (),
    below: str = "",
) -> Staged:
    """Turn the paths in `values` into the target's, and return the files that must go there.

    They go `below` a folder of the run's inputs. Raises UsageError for a data file outside
    its dataset_dir, where another machine would not find it.
    """
    found: list[Input] = []
    links: list[Link] = []
    for key in PATH_KEYS:
        path = values.get(key)
        if isinstance(path, str) and Path(path).is_absolute():
            found += _of_path(target, run_id, values, key, Path(path), reports, below)
    for item in named:
        name = f"{below}{item.name}"
        if item.path is not None:
            there = target.remote_path(run_id, name, item.path)
            if there != str(item.path):
                found += _of_model(item, item.path, name)
        elif item.result is not None:
            there = str(target.location(run_id).run / "inputs" / name)
            links.append(Link(name, item.result.run_id, item.result.folder, item.origin))
        else:
            continue
        put_name(values, item.key, item.place, there)
    return Staged(tuple(found), tuple(links))


def _of_path(
    target: Target,
    run_id: str,
    values: Arguments,
    key: str,
    path: Path,
    reports: Sequence[DatasetReport],
    below: str,
) -> list[Input]:
    name = f"{below}{key}"
    if key == "tokenized_path" and path.is_dir() and any(path.iterdir()):
        # Rows that are there already; else it is the place of a cache, which each machine has.
        name = f"{name}/{path.name}"
    values[key] = target.remote_path(run_id, name, path)
    if values[key] == str(path):
        return []
    if key == "dataset_dir":
        files = [Path(report.file) for report in reports if is_local(report)]
        _names_that_move(reports)
        if not values.get("media_dir"):
            files += [Path(file) for report in reports for file in report.media]
        return _below(path, [path / REGISTRY, *files], name)
    if path.is_dir() and key != "cache_dir":
        return _below(path, sorted(path.rglob("*")), name)
    return [Input(f"{name}/{path.name}", path)] if path.is_file() else []


def _of_model(item: Named, folder: Path, name: str) -> Iterator[Input]:
    """Yield the files of a model or adapter that are loaded: no code, no pickles."""
    for file in kinds.choose(item.kind, (path.name for path in folder.iterdir())):
        yield Input(f"{name}/{file}", folder / file)


def _names_that_move(reports: Sequence[DatasetReport]) -> None:
    """Raise UsageError for a picture named by its whole path: on a host it lies elsewhere."""
    for report in reports:
        if report.absolute_media:
            raise UsageError(
                f"{report.file}: rows name {report.absolute_media}, a path of this machine",
                hint="write names relative to `media_dir`, or to `dataset_dir` where there is none",
            )


def is_local(report: DatasetReport) -> bool:
    """Whether the data set is files of this machine, not an address."""
    return Path(report.file).is_absolute() and Path(report.file).exists()


def _below(folder: Path, files: Sequence[Path], into: str) -> list[Input]:
    found: dict[str, Input] = {}
    for file in files:
        if not file.is_relative_to(folder):
            raise UsageError(
                f"{file}: lies outside {folder} and would not be found on a host",
                hint=f"copy it into {folder} and register it with `inv data.register`",
            )
        if file.is_dir():
            found |= {i.name: i for i in _below(folder, sorted(file.rglob("*")), into)}
        else:
            name = f"{into}/{file.relative_to(folder).as_posix()}"
            found[name] = Input(name, file)
    return list(found.values())
