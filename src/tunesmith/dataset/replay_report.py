"""What the replay of a config found, in words: what becomes of rows, what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.core import formats
from tunesmith.core.documents import JsonObject
from tunesmith.dataset.cost import Estimate, steps_of
from tunesmith.dataset.histogram import Lengths, quantile, terminal
from tunesmith.dataset.overlap import Overlap

_KINDS = {
    "dropped": "are dropped",
    "truncated": "are cut at cutoff_len",
    "untrained": "have nothing left to train on",
    "control": "hold the text of a control token",
    "unknown": "hold text the tokenizer does not know",
}
SHOWN = 10  # rows of a kind on the screen


def lengths_of(found: JsonObject) -> Lengths:
    """Return (tokens before the cut, rows) of all data sets to train on, ascending."""
    total: dict[int, int] = {}
    for name in found["train"]:
        for length, rows in found["datasets"][name]["full"]:
            total[length] = total.get(length, 0) + rows
    return sorted(total.items())


def lines(found: JsonObject) -> Iterator[str]:
    """Yield what becomes of the rows, data set by data set, then of all together."""
    cutoff = found["cutoff_len"]
    for name, part in found["datasets"].items():
        counts = part["counts"]
        cut, dropped = counts.get("truncated", 0), counts.get("dropped", 0)
        yield f"{name}: {part['rows']} rows, {part['kept']} kept, {dropped} dropped, {cut} cut"
        for kind, words in _KINDS.items():
            examples = [item for item in part["told"] if item["kind"] == kind]
            if not examples:
                continue
            yield f"  {counts[kind]} {words}"
            for item in examples[:SHOWN]:
                yield f"    row {item['row']}: {item['reason']}"
            if counts[kind] > SHOWN:
                yield f"    ... and {counts[kind] - SHOWN} more"
    lengths = lengths_of(found)
    if lengths:
        rows = sum(count for _, count in lengths)
        cut = sum(found["datasets"][name]["counts"].get("truncated", 0) for name in found["train"])
        whole = quantile(lengths, 0.99)
        yield f"tokens a row: median {quantile(lengths, 0.5)}, longest {lengths[-1][0]}"
        yield (
            f"cut at cutoff_len {cutoff}: {cut / rows:.1%} of the rows; "
            f"cutoff_len {whole} keeps 99 % of them whole"
        )
        tokens = sum(found["datasets"][name]["tokens"] for name in found["train"])
        trained = sum(found["datasets"][name]["trained_tokens"] for name in found["train"])
        yield f"trained tokens: {trained / tokens:.0%} of {tokens}" if tokens else "no tokens"
        yield from (f"  {line}" for line in terminal(lengths, cutoff))
    yield from passes(found)
    yield from (f"thinking: {line}" for line in thinking(found))


def passes(found: JsonObject) -> Iterator[str]:
    """Yield the rows that a pass takes of each data set, and the steps of the training."""
    taken = ", ".join(f"{name} {rows}" for name, rows in found["taken"].items())
    held = len(found["validation"])
    of = "sequences" if found["packing"] else "rows"
    yield (
        f"a pass: {found['sequences']} {of}"
        + (f" ({taken})" if taken else "")
        + (f", {held} held out" if held else "")
    )
    for name in dict.fromkeys(found["train"]):
        unseen = found["datasets"][name]["kept"] - found["seen"].get(name, 0)
        if unseen:
            yield f"warning: {unseen} rows of {name} are never seen: mix_strategy leaves them out"
    yield f"steps: {steps_of(found)} on one GPU or CPU"


def thinking(found: JsonObject) -> Iterator[str]:
    """Yield whether enable_thinking fits the data; source of the rules: data/template.py."""
    counts = [found["datasets"][name]["counts"] for name in found["train"]]
    thought = sum(count.get("think", 0) for count in counts)
    plain = sum(count.get("no_think", 0) for count in counts)
    mode, name = found["enable_thinking"], found["template"]
    if not found["reasoning"]:
        if thought:
            yield f"{thought} answers hold <think>, which template {name} takes for plain text"
        return
    if thought and plain:
        effect = {
            True: "those without are trained to think nothing",
            False: "the reasoning of the others is deleted",
            None: "chat will ask for no thinking",
        }[mode]
        yield (
            f"{thought} answers with <think> and {plain} without: make them one kind; with "
            f"enable_thinking: {_yaml(mode)} {effect}"
        )
    elif plain and mode is not False:
        what = "an empty <think> is put before each answer and trained"
        if mode is None:
            what = "training and chat then differ in the empty <think>"
        yield f"no answer holds <think>: write `enable_thinking: false` ({what} with {_yaml(mode)})"
    elif thought and mode is not True:
        what = "the reasoning is deleted" if mode is False else "chat then asks it not to think"
        yield f"all answers hold <think>: write `enable_thinking: true` ({what} with {_yaml(mode)})"
    elif thought or plain:
        yield f"enable_thinking: {_yaml(mode)} fits the data"


def _yaml(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value]


def overlap_lines(seen: Overlap, by_split: bool) -> Iterator[str]:
    """Yield how many validation rows the training knows, and how to fix it."""
    if not seen.validation:
        return
    if not seen.same + seen.near:
        yield f"validation: {seen.validation} rows, none of them in the training rows"
        return
    yield (
        f"validation: {seen.validation} rows; the training has the question of {seen.same} of them "
        f"and near-duplicates of {seen.near} more"
    )
    yield from (f"  {example}" for example in seen.examples)
    if by_split:
        yield "  val_size draws rows at random; `inv data.split` keeps alike ones together"


def cost_lines(made: Estimate, gpu: str) -> Iterator[str]:
    """Yield steps, time and cost, and that they are estimated."""
    low, high = map(formats.duration, made.seconds)
    cost = "" if made.cost is None else f", cost {made.cost[0]:.2f} to {made.cost[1]:.2f}"
    yield (
        f"{made.steps} steps; on one {gpu} about {low} to {high}{cost} "
        "(an estimate: configs/gpus.yml says from what)"
    )
