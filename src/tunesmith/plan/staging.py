"""Which files of this machine a run reads on another one, and where they lie there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.documents import Arguments
from tunesmith.core.errors import UsageError
from tunesmith.dataset.registry import REGISTRY
from tunesmith.dataset.report import DatasetReport
from tunesmith.plan.plan import PATH_KEYS, Input
from tunesmith.plan.target import Target


def stage_inputs(
    target: Target,
    run_id: str,
    values: Arguments,
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
        values[key] = target.remote_path(run_id, name, Path(path))
        if values[key] == path:
            continue
        if key == "dataset_dir":
            files = [Path(report.file) for report in reports if is_local(report)]
            _names_that_move(reports)
            if not values.get("media_dir"):
                files += [Path(file) for report in reports for file in report.media]
            found += _below(Path(path), [Path(path) / REGISTRY, *files], name)
        elif Path(path).is_dir():
            found += _below(Path(path), sorted(Path(path).rglob("*")), name)
        elif Path(path).is_file():
            found.append(Input(f"{name}/{Path(path).name}", Path(path)))
    return tuple(found)


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
