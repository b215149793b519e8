"""Rows become token ids as LLaMA-Factory makes them, with less work around each.

Its own code decides every row: what a question is, where it is cut, what is learned. What is
done otherwise is how rows are handed over and written, and nothing of that is in the result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def hasten() -> None:
    """Let the libraries make rows with less waiting; the rows are the same. Imports them.

    What is imported by now stays until the process ends: the garbage collector need not walk
    through it for each few hundred rows, which was a tenth of the time.
    """
    encode_quickly()
    convert_in_batches()
    infer_types_once()
    gc.freeze()


def encode_quickly() -> None:
    """Let transformers' tokenizers go straight to their core where nothing else is asked.

    LLaMA-Factory encodes each part of a row by `tokenizer.encode(text,
    add_special_tokens=False)`. transformers 4.52 makes a batch of it, with masks and offsets
    that are thrown away: a quarter of the time that preparing rows takes. The ids are the
    same; whatever is asked otherwise, or of a tokenizer with ways of its own, goes the old way.
    """
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

    usual = PreTrainedTokenizerFast.encode
    if getattr(usual, "goes_straight", False):
        return
    # GPT2's own check that texts are no lists of words.
    known = {
        (kind._encode_plus, kind._batch_encode_plus)
        for kind in (PreTrainedTokenizerFast, GPT2TokenizerFast)
    }

    def encode(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        core = self._tokenizer
        if (
            arguments
            or options != {"add_special_tokens": False}
            or type(text) is not str
            or (type(self)._encode_plus, type(self)._batch_encode_plus) not in known
            or core.truncation is not None
            or core.padding is not None
            or core.encode_special_tokens != self.split_special_tokens
        ):
            return usual(self, text, *arguments, **options)
        return core.encode_batch_fast([text], add_special_tokens=False)[0].ids

    encode.goes_straight = True  # type: ignore[attr-defined]
    PreTrainedTokenizerFast.encode = encode


def convert_in_batches() -> None:
    """Let rows be brought into LLaMA-Factory's form many at a time.

    It asks the datasets library for one row after the other, which reads and writes each by
    itself: five times as long as the conversion of a thousand rows that are read together.
    """
    from datasets import Dataset
    from llamafactory.data import loader

    usual = loader.align_dataset
    if getattr(usual, "takes_batches", False):
        return

    def align_dataset(dataset: Any, *arguments: Any) -> Any:
        # A stream has a map of its own.
        return usual(_InBatches(dataset) if type(dataset) is Dataset else dataset, *arguments)

    align_dataset.takes_batches = True  # type: ignore[attr-defined]
    loader.align_dataset = align_dataset


def infer_types_once() -> None:
    """Let the datasets library ask a column's type of the column that it has made.

    datasets 3.6 makes each column of a batch a second time to see its type.
    """
    from datasets.arrow_writer import TypedSequence, generate_from_arrow_type

    make, usual = TypedSequence.__arrow_array__, TypedSequence.get_inferred_type
    if getattr(usual, "remembers", False):
        return

    def arrow_array(self: Any, type: Any = None) -> Any:
        made = make(self, type)
        self.made_type = made.type
        return made

    def get_inferred_type(self: Any) -> Any:
        made = getattr(self, "made_type", None)
        if self._inferred_type is None and made is not None:
            self._inferred_type = generate_from_arrow_type(made)
        return usual(self)

    get_inferred_type.remembers = True  # type: ignore[attr-defined]
    TypedSequence.__arrow_array__ = arrow_array
    TypedSequence.get_inferred_type = get_inferred_type


class EachRow:
    """A function of a row, for a batch of rows; pickled by its state, for a fingerprint."""

    def __init__(self, function: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self._function = function

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of the rows that the function makes of the batch's."""
        columns = {name: batch[name] for name in batch}
        rows = zip(*columns.values(), strict=True)
        made = [self._function(dict(zip(columns, row, strict=True))) for row in rows]
        return {name: [row[name] for row in made] for name in made[0]}


class _InBatches:
    """A data set as `align_dataset` uses one: looked into, and mapped row by row."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset)

    def map(self, function: Any, *, batched: bool, **options: Any) -> Any:
        if not batched:
            function = EachRow(function)
        return self._dataset.map(function, batched=True, **options)
