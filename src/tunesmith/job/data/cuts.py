"""How many prepared rows were cut at cutoff_len, and how many have nothing to learn.

Counted from the ids themselves, so that rows found in the cache and rows of several processes
count too. Imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.core.documents import Config
from tunesmith.job.run.failures import JobError

_IGNORED = -100  # LLaMA-Factory's IGNORE_INDEX: a token without loss
_AT_ONCE = 1000
# (ids, labels) of a row: of the stages sft, pt and kto; of the pairs of rm and dpo.
_COLUMNS = (
    ("input_ids", "labels"),
    ("chosen_input_ids", "chosen_labels"),
    ("rejected_input_ids", "rejected_labels"),
)


@dataclass(frozen=True)
class Cuts:
    """Rows; those that fill `cutoff_len`; those without a token to train on.

    A row that is cut has exactly `cutoff_len` tokens (infer_seqlen, data/processor of
    LLaMA-Factory 0.9.3), so the second are those cut and the few that are just as long.
    """

    rows: int
    full: int
    untrained: int


def count(dataset: Any, cutoff_len: int, *, generates: bool = False) -> Cuts | None:
    """Return what was cut of a `datasets.Dataset` of prepared rows; None for a stream.

    `generates`: labels are the answers expected of a prediction, and share cutoff_len with the
    prompt (data/processor/unsupervised.py).
    """
    import pyarrow.compute as pc

    names: Sequence[str] = getattr(dataset, "column_names", None) or ()
    pairs = [pair for pair in _COLUMNS if set(pair) <= set(names)]
    if not pairs or not hasattr(dataset, "__len__"):
        return None
    view = dataset.with_format("arrow")
    full, untrained = 0, 0
    for start in range(0, len(view), _AT_ONCE):
        table = view[start : start + _AT_ONCE]
        is_full, has_none = None, None
        for ids, labels in pairs:
            lengths = pc.list_value_length(table.column(ids))
            wanted = table.column(labels).combine_chunks()
            if generates:
                lengths = pc.add(lengths, pc.list_value_length(wanted))
            fills = pc.greater_equal(lengths, cutoff_len)
            is_full = fills if is_full is None else pc.or_(is_full, fills)
            learned = pc.not_equal(pc.list_flatten(wanted), _IGNORED)
            places = pc.unique(pc.filter(pc.list_parent_indices(wanted), learned))
            none = table.num_rows - len(places)
            has_none = none if has_none is None else max(has_none, none)
        full += pc.sum(is_full).as_py() or 0
        untrained += has_none or 0
    return Cuts(len(view), full, untrained)


class CutReport(TrainerCallback):  # type: ignore[misc]
    """Tells once what was cut of the rows that are trained, or of the prompts of a prediction.

    Stops a training of which no row has a token to learn: it would move no weight.
    """

    def __init__(self, report: Callable[..., None], cutoff_len: int, *, packed: bool) -> None:
        self._report = report
        self._cutoff_len = cutoff_len
        self._packed = packed
        self._told = False
        self._found: Cuts | None = None

    @classmethod
    def of(cls, config: Config, report: Callable[..., None]) -> CutReport:
        """Return the one for a config's rows."""
        packing = config.get("packing")
        packed = bool(config.get("neat_packing") or packing)
        packed = packed or (packing is None and config.get("stage") == "pt")
        return cls(report, int(config.get("cutoff_len") or 2048), packed=packed)

    def record(self) -> dict[str, Any]:
        """Return {"cuts": ...} for the phase's results; {} where nothing was counted."""
        if self._found is None:
            return {}
        return {"cuts": asdict(self._found) | {"cutoff_len": self._cutoff_len}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the rows of the training; raise JobError of class `data` when none is learned."""
        loader = kwargs.get("train_dataloader")
        found = count(getattr(loader, "dataset", None), self._cutoff_len)
        # Of packed sequences each is full.
        if found is None or self._packed:
            return
        self._found = found
        if found.rows and found.untrained == found.rows:
            raise JobError(
                "data",
                f"none of {found.rows} rows has a token to train on at cutoff_len "
                f"{self._cutoff_len}: raise it, or see with `inv data.preview` what is left",
            )
        if not state.is_world_process_zero:
            return
        if found.full:
            text = f"{self._cut(found, 'rows')} (`inv data.check --config` tells each row)"
            self._report("note", text=text)
        if found.untrained:
            text = f"{found.untrained} of {found.rows} rows have no token to train on"
            self._report("note", text=text)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the prompts of a prediction, at its first batch."""
        if self._told or not getattr(args, "predict_with_generate", False):
            return
        self._told = True
        loader = kwargs.get("eval_dataloader")
        found = count(getattr(loader, "dataset", None), self._cutoff_len, generates=True)
        self._found = found
        if found is not None and found.full and state.is_world_process_zero:
            text = f"{self._cut(found, 'prompts or expected answers')}; raise cutoff_len"
            self._report("note", text=text)

    def _cut(self, found: Cuts, what: str) -> str:
        return (
            f"{found.full} of {found.rows} {what} fill cutoff_len {self._cutoff_len}: what is "
            "longer was cut"
        )
