"""Which rows a pass of a training takes from its data sets, and the steps that follow. Pure.

The arithmetic is LLaMA-Factory 0.9.3's and that of the libraries below it, without the rows:
_load_single_dataset (data/loader.py), merge_dataset and split_dataset (data/data_utils.py),
_interleave_map_style_datasets and train_test_split (datasets 3.6, arrow_dataset.py),
set_initial_training_values and get_warmup_steps (transformers 4.52.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.documents import Config
from tunesmith.core.errors import UsageError

# Draws that datasets makes at once; the sequence is the same however they are grouped.
_DRAWS = 1000


@dataclass(frozen=True)
class Source:
    """A data set as it lies there: its rows, and `num_samples` of its entry."""

    key: str
    rows: int
    samples: int | None = None


@dataclass(frozen=True)
class Share:
    """What a pass takes of one data set.

    `rows` are those that are there, `taken` counts repetitions, `seen` does not; `cut_by` are the
    keys for which some are never seen.
    """

    key: str
    rows: int
    taken: int
    seen: int
    cut_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingPass:
    """The rows of one pass and the optimiser steps of the whole training.

    `sequences` is None where packing makes them of rows, and `steps` with it, or in stage ppo,
    which counts its own, unless `max_steps` says how many; `streamed`: the rows that so many
    steps read of a stream.
    """

    shares: tuple[Share, ...]
    rows: int
    held_out: int
    sequences: int | None
    steps: int | None
    streamed: int | None = None


def sources_of(reports: Sequence[Any], samples: Mapping[str, int]) -> list[Source] | None:
    """Return the data sets of reports (dataset/report.py); None where one was not counted."""
    if not reports or any(report.rows is None or not report.key for report in reports):
        return None
    return [Source(r.key, r.rows, samples.get(r.key)) for r in reports]


def training_pass(config: Config, sources: Sequence[Source], processes: int = 1) -> TrainingPass:
    """Return what a config's training takes of `sources`, its data sets in order.

    `processes` train at once, one a GPU. Raises UsageError for a mixture or a `val_size` at which
    LLaMA-Factory stops.
    """
    shares = tuple(_mixed(config, sources, "dataset"))
    rows = sum(share.taken for share in shares)
    held_out = _held_out(config, rows)
    batch = _number(config, "per_device_train_batch_size", 8) * processes
    accumulation = _number(config, "gradient_accumulation_steps", 1)
    most = _number(config, "max_steps", -1)
    packed = bool(config.get("packing") or config.get("neat_packing"))
    packed = packed or (config.get("packing") is None and config.get("stage") == "pt")
    sequences = None if packed else rows - held_out
    streamed = None
    if most > 0:
        steps: int | None = most
        streamed = most * batch * accumulation if config.get("streaming") else None
    elif sequences is None or config.get("stage") == "ppo":
        steps = None
    else:
        steps = steps_of(
            sequences,
            batch,
            accumulation,
            float(config.get("num_train_epochs") or 3.0),
            drop_last=bool(config.get("dataloader_drop_last")),
        )
    return TrainingPass(shares, rows, held_out, sequences, steps, streamed)


def steps_of(
    sequences: int, batch: int, accumulation: int, epochs: float, *, drop_last: bool = False
) -> int:
    """Return the optimiser steps of a training without `max_steps`; `batch` over all processes."""
    batches = sequences // batch if drop_last else math.ceil(sequences / batch)
    return math.ceil(epochs * max(math.ceil(batches / accumulation), 1))


def check_eval(config: Config, sources: Sequence[Source]) -> None:
    """Raise UsageError for a mixture of validation sets at which LLaMA-Factory stops."""
    if len(sources) > 1 and not config.get("eval_on_each_dataset"):
        list(_mixed(config, sources, "eval_dataset"))


def _number(config: Config, key: str, default: int) -> int:
    value = config.get(key)
    return default if value is None else int(value)


def _available(source: Source, config: Config) -> tuple[int, int]:
    """Return rows and different rows that are left of num_samples and max_samples."""
    rows, seen = source.rows, source.rows
    if source.samples is not None and not config.get("streaming"):
        # A permutation first, then as many again at random as are asked for beyond.
        rows, seen = source.samples, min(source.samples, source.rows)
    if config.get("max_samples") is not None:
        rows = min(rows, _number(config, "max_samples", rows))
        seen = min(seen, rows)
    return rows, seen


def _cut_by(source: Source, config: Config, rows: int, taken: int) -> Iterator[str]:
    """Yield the keys that keep rows of a set out of a pass; `rows` are those left of its own."""
    if source.samples is not None and source.samples < source.rows:
        yield "num_samples"
    if config.get("max_samples") is not None and int(config["max_samples"]) == rows < source.rows:
        yield "max_samples"
    if taken < rows:
        yield "mix_strategy"


def _mixed(config: Config, sources: Sequence[Source], key: str) -> Iterator[Share]:
    available = [_available(source, config) for source in sources]
    lengths = [rows for rows, _ in available]
    strategy = str(config.get("mix_strategy") or "concat")
    if len(sources) == 1 or strategy == "concat":
        taken = lengths
    elif (weights := _weights(config, sources, key)) is not None:
        taken = _drawn(lengths, weights, strategy, _number(config, "seed", 42))
    else:
        # In turn, until the first one or all of them are exhausted; a short one begins anew.
        most = min(lengths) if strategy == "interleave_under" else max(lengths)
        taken = [most] * len(lengths)
    for source, (rows, seen), some in zip(sources, available, taken, strict=True):
        cut_by = tuple(_cut_by(source, config, rows, some))
        yield Share(source.key, source.rows, some, min(seen, some), cut_by)


def _weights(config: Config, sources: Sequence[Source], key: str) -> list[float] | None:
    listed = config.get("interleave_probs")
    if listed is None:
        return None
    words = listed if isinstance(listed, (list, tuple)) else str(listed).split(",")
    try:
        weights = [float(word) for word in words]
    except ValueError:
        raise UsageError(
            f"`interleave_probs` is {listed}: numbers with commas between them are read",
            hint=f"write `interleave_probs: {_equal(len(sources))}`",
        ) from None
    if len(weights) != len(sources):
        raise UsageError(
            f"`interleave_probs` has {len(weights)} numbers for {len(sources)} sets of `{key}`",
            hint=f"write `interleave_probs: {_equal(len(sources))}`",
        )
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-8:
        raise UsageError(
            f"`interleave_probs` is {listed}: the shares are none below 0 and add up to 1, these "
            f"to {sum(weights):g}",
            hint=f"write `interleave_probs: {_scaled(weights)}`",
        )
    if 0 in weights and config.get("mix_strategy") == "interleave_over":
        name = sources[weights.index(0)].key
        raise UsageError(
            f"`interleave_probs` gives {name} no share: `interleave_over` waits for ever until it "
            "was used up",
            hint=f"remove {name} from `{key}`, or give it a share",
        )
    return weights


def _equal(number: int) -> str:
    return _scaled([1.0] * number)


def _scaled(weights: Sequence[float]) -> str:
    """Return shares with three digits that add up to 1."""
    total = sum(max(weight, 0) for weight in weights) or 1.0
    shares = [round(max(weight, 0) / total, 3) for weight in weights]
    shares[-1] = round(1 - sum(shares[:-1]), 3)
    return ",".join(f"{share:g}" for share in shares)


def _drawn(lengths: Sequence[int], weights: Sequence[float], strategy: str, seed: int) -> list[int]:
    """Return how often each set is drawn until one, or each of them, is exhausted."""
    # Here: a fifth of what `inv --dry train` waits for, and only such mixtures draw.
    import numpy

    random = numpy.random.default_rng(seed)
    wanted = numpy.array(lengths)
    counts = numpy.zeros(len(lengths), dtype=numpy.int64)
    ends = numpy.all if strategy == "interleave_over" else numpy.any
    while True:
        draws = random.choice(len(lengths), size=_DRAWS, p=weights)
        after = counts + numpy.bincount(draws, minlength=len(lengths))
        if ends(after >= wanted):
            break
        counts = after
    for draw in draws:
        counts[draw] += 1
        if ends(counts >= wanted):
            break
    return [int(count) for count in counts]


def _held_out(config: Config, rows: int) -> int:
    """Return the rows that `val_size` holds out, as train_test_split rounds them."""
    size = float(config.get("val_size") or 0)
    if size <= 1e-6:
        return 0
    held_out = int(size) if size > 1 else math.ceil(size * rows)
    if config.get("streaming"):
        return min(held_out, rows)
    if held_out >= rows:
        some = max(rows // 10, 1)
        hint = f"write `val_size: {0.1 if rows > 1 else 0}`" + (
            f" ({some} rows)" if rows > 1 else ""
        )
        raise UsageError(
            f"`val_size` is {size:g} of {rows} rows: no row is left to train on", hint=hint
        )
    return held_out


def lines(made: TrainingPass, config: Config) -> Iterator[str]:
    """Yield the rows of a pass, set by set, and the steps; then what is most likely not meant."""
    parts = ", ".join(
        f"{share.key} {share.taken}"
        + (f" of {share.rows}" if share.taken < share.rows else "")
        + (f" ({share.seen} different)" if share.seen < share.taken else "")
        for share in made.shares
    )
    many = len(made.shares) > 1
    left = f", {made.held_out} held out" if made.held_out else ""
    yield f"rows a pass: {parts}{f' ({made.rows} in all)' if many else ''}{left}"
    if made.steps is None:
        counted = "packing decides; `inv data.check --config` counts them"
        yield f"steps: {'stage ppo counts its own' if made.sequences is not None else counted}"
    else:
        yield f"steps: {made.steps} on one GPU or CPU"
    yield from warnings(made, config)


def warnings(made: TrainingPass, config: Config) -> Iterator[str]:
    """Yield what of the rows and steps is most likely not meant."""
    for share in made.shares:
        if share.seen < share.rows:
            number, why = share.rows - share.seen, ", ".join(share.cut_by)
            yield f"warning: {number} of {share.rows} rows of {share.key} are never seen ({why})"
    if made.streamed is not None and made.streamed < made.rows - made.held_out:
        yield (
            f"warning: max_steps reads {made.streamed} of {made.rows} rows of the stream"
            + _behind(made, config)
        )
    if made.steps is not None:
        yield from warmup_warnings(made.steps, config)


def warmup_warnings(steps: int, config: Config) -> Iterator[str]:
    """Yield that the learning rate never gets where it should, if it does not."""
    warmup = _number(config, "warmup_steps", 0)
    if warmup <= 0:
        warmup = math.ceil(steps * float(config.get("warmup_ratio") or 0))
    if warmup >= steps:
        change = "warmup_steps" if config.get("warmup_steps") else "warmup_ratio"
        write = steps // 10 if change == "warmup_steps" else 0
        yield (
            f"warning: the warmup takes {warmup} of {steps} steps: the learning rate never gets "
            f"where it should; write `{change}: {write}`"
        )


def _behind(made: TrainingPass, config: Config) -> str:
    """Return which sets lie behind what a stream reads one after the other; "" for none."""
    if str(config.get("mix_strategy", "concat")) != "concat" or made.streamed is None:
        return ""
    # The shuffle's buffer is filled before the first row leaves it.
    reach, before, behind = made.streamed + _number(config, "buffer_size", 16384), 0, []
    for share in made.shares:
        if before >= reach:
            behind.append(share.key)
        before += share.rows
    return f": none of {', '.join(behind)}, which come after" if behind else ""
