"""The rows of a pass: data sets mixed, and packed, by LLaMA-Factory's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tunesmith.job.data.rows import DataPipeline


def merged(
    pipeline: DataPipeline, rows: Mapping[str, int], names: Sequence[str]
) -> list[tuple[str, int]]:
    """Return (data set, number of the row) of each row of a pass, as LLaMA-Factory mixes them.

    `rows` says how many each data set has.
    """
    from datasets import Dataset
    from llamafactory.data.data_utils import merge_dataset

    # One that is named twice is loaded once (data/loader.py keeps a dict).
    names = list(dict.fromkeys(names))
    tables = [
        Dataset.from_dict({"set": [place] * rows[name], "row": range(1, rows[name] + 1)})
        for place, name in enumerate(names)
    ]
    merged = merge_dataset(tables, pipeline.data_args, seed=pipeline.training_args.seed)
    return [
        (names[place], row) for place, row in zip(merged["set"][:], merged["row"][:], strict=True)
    ]


def packs(
    pipeline: DataPipeline,
    merged: Sequence[tuple[str, int]],
    of_row: Mapping[tuple[str, int], int],
) -> list[int]:
    """Return the sequences that packing makes of the rows of a pass.

    Those of a batch, as Dataset.map hands it over with the rows that are dropped, are packed
    together (data/processor/supervised.py); texts are joined and cut into blocks, and what is left
    of a batch is lost (pretrain.py).
    """
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    block, made = pipeline.data_args.cutoff_len, 0
    size = pipeline.data_args.preprocessing_batch_size
    for start in range(0, len(merged), size):
        some = [of_row[row] for row in merged[start : start + size] if row in of_row]
        made += sum(some) // block if pipeline.stage == "pt" else len(greedy_knapsack(some, block))
    return [block if pipeline.stage == "pt" else block + 1] * made
