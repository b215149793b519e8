"""The rows and steps of a planned training, from what the check of its data has counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.core import documents
from tunesmith.dataset import mix
from tunesmith.dataset.registry import resolve
from tunesmith.dataset.report import DatasetReport
from tunesmith.job.run.schema import DataFile


def planned(values: documents.Config, reports: Sequence[DatasetReport]) -> mix.TrainingPass | None:
    """Return what a training takes of its rows; None where some could not be counted here.

    Raises UsageError for a mixture or a `val_size` at which LLaMA-Factory stops.
    """
    eval_sets = _sources(values, reports, "eval_dataset")
    if eval_sets:
        mix.check_eval(values, eval_sets)
    sources = _sources(values, reports, "dataset")
    return mix.training_pass(values, sources) if sources else None


def lines(made: mix.TrainingPass | None, values: documents.Config) -> tuple[str, ...]:
    """Return the pass in words; nothing where it is not known."""
    return () if made is None else tuple(mix.lines(made, values))


def recorded(data: Sequence[DataFile], made: mix.TrainingPass | None) -> tuple[DataFile, ...]:
    """Return run.json's data sets with what a pass takes of them, for the report."""
    shares = {share.key: share for share in made.shares} if made else {}
    return tuple(
        replace(
            item,
            figures={
                **item.figures,
                "rows_a_pass": shares[item.key].taken,
                "never_seen": shares[item.key].rows - shares[item.key].seen,
            },
        )
        if item.key in shares
        else item
        for item in data
    )


def _sources(
    values: documents.Config, reports: Sequence[DatasetReport], key: str
) -> list[mix.Source] | None:
    names = str(values.get(key) or "")
    folder = str(values.get("dataset_dir", "data"))
    if not names or not reports or values.get("tokenized_path"):
        return None
    entries = resolve(Path(folder), names)
    of_key = {report.key: report for report in reports}
    chosen = [of_key[entry.key] for entry in entries]
    samples = {
        str(entry.key): int(entry.other["num_samples"])
        for entry in entries
        if isinstance(entry.other.get("num_samples"), int)
    }
    return mix.sources_of(chosen, samples)
