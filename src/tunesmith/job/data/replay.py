"""`python -m tunesmith.job.data.replay REQUEST RESULT`: LLaMA-Factory's view of a config's rows.

Its own loader, converter, template, tokenizer and processor (data/ of 0.9.3) run on every
row, before anything is trained; nothing is imitated but the arithmetic of steps. REQUEST is
JSON: {"config": train config with absolute paths, "workers": processes, "rows": file}. RESULT
is written at the end; the file gets one JSON line for each row that is not simply kept. Lines
on stdout are {"done": rows, "total": rows}.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tunesmith.core.documents import AlignedRow, Config
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.data import passes
from tunesmith.job.data.rows import IGNORED, DataPipeline, Table

EXAMPLES = 50  # rows of one kind that are listed one by one
_SLICE = 500  # rows a process takes at once


@dataclass(frozen=True)
class RowNote:
    """Why a row is not simply kept; `row` is its number in the data set, from 1."""

    kind: str  # dropped, truncated, untrained, control or unknown
    row: int
    reason: str


@dataclass(frozen=True)
class Steps:
    """What a training makes of the rows that are kept."""

    validation: list[tuple[str, int]]  # (data set, number of the row) of what val_size holds out
    taken: dict[str, int]  # rows of each data set in a pass, repeated ones counted again
    seen: dict[str, int]  # different rows of each
    sequences: int  # a pass has
    batch_size: int  # of one device
    accumulation: int
    epochs: float
    max_steps: int
    drop_last: bool  # an incomplete batch at the end of a pass is left out
    tokens_an_epoch: int
    padded_tokens_an_epoch: int


@dataclass(frozen=True)
class Replay:
    """What becomes of every row of a config."""

    datasets: dict[str, Part]
    train: list[str]  # names of data sets
    eval: list[str]
    cutoff_len: int
    packing: bool
    template: str | None
    reasoning: bool  # the template has a thinking mode
    enable_thinking: bool | None
    steps: Steps

    def record(self) -> dict[str, object]:
        """Return it as JSON."""
        return {
            "datasets": {name: part.record() for name, part in self.datasets.items()},
            "train": self.train,
            "eval": self.eval,
            "cutoff_len": self.cutoff_len,
            "packing": self.packing,
            "template": self.template,
            "reasoning": self.reasoning,
            "enable_thinking": self.enable_thinking,
            **asdict(self.steps),
        }


@dataclass
class Part:
    """What is known of some rows of one data set; parts of all rows are added up."""

    rows: int = 0
    kept: list[int] = field(default_factory=list)  # numbers of the rows, from 1
    lengths: list[int] = field(default_factory=list)  # tokens after the cut, one a kept row
    full: Counter[int] = field(default_factory=Counter)  # tokens before it: how many rows
    trained_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[RowNote] = field(default_factory=list)

    def note(self, kind: str, row: int, reason: str) -> None:
        """Count a row of a kind, and keep the reason."""
        self.counts[kind] += 1
        self.notes.append(RowNote(kind, row, reason))

    def add(self, other: Part) -> None:
        """Add a later part; of each kind only the first rows' reasons are kept."""
        for note in other.notes:
            if sum(known.kind == note.kind for known in self.notes) < EXAMPLES:
                self.notes.append(note)
        self.rows += other.rows
        self.kept += other.kept
        self.lengths += other.lengths
        self.full.update(other.full)
        self.trained_tokens += other.trained_tokens
        self.counts.update(other.counts)

    def record(self) -> dict[str, object]:
        """Return it as JSON."""
        return {
            "rows": self.rows,
            "kept": len(self.kept),
            "tokens": sum(self.lengths),
            "trained_tokens": self.trained_tokens,
            "counts": dict(self.counts),
            "told": [asdict(n) for n in sorted(self.notes, key=lambda note: (note.kind, note.row))],
            "full": sorted(self.full.items()),
        }


def judge(pipeline: DataPipeline, rows: Sequence[AlignedRow], first: int) -> Part:
    """Encode rows of one data set, the first of which has number `first`."""
    part = Part(rows=len(rows))
    words = _control_words(pipeline)
    for number, row in enumerate(rows, first):
        if pipeline.stage == "sft" and (len(row["_prompt"]) % 2 != 1 or len(row["_response"]) != 1):
            part.note("dropped", number, _why_dropped(row))
            continue
        if pipeline.stage == "pt":
            _judge_text(pipeline, row, number, part)
            continue
        ids, labels, pairs = pipeline.encode(row)
        full = sum(len(source) + len(target) for source, target in pairs)
        full += 1 if pipeline.codec.template.efficient_eos else 0
        part.full[full] += 1
        if pipeline.data_args.packing and len(ids) > pipeline.data_args.cutoff_len:
            part.note("dropped", number, f"{len(ids)} tokens: packing leaves out what is longer")
            continue
        trained = sum(label != IGNORED for label in labels)
        part.kept.append(number)
        part.lengths.append(len(ids))
        part.trained_tokens += trained
        if full > len(ids):
            part.note("truncated", number, _why_cut(full, len(ids), labels, pairs))
        if not trained:
            part.note("untrained", number, "no token of the answer is left to train on")
        _inspect(pipeline, row, ids, number, part, words)
    return part


def _why_dropped(row: AlignedRow) -> str:
    if not row["_prompt"] and not row["_response"]:
        return "turns out of order, or a question without an answer"
    if len(row["_response"]) != 1:
        return "no answer that is a string"
    return "the turns do not end with a question"


def _why_cut(full: int, left: int, labels: Sequence[int], pairs: Sequence[Any]) -> str:
    answers = sum(len(target) for _, target in pairs)
    kept = sum(label != IGNORED for label in labels)
    turns = f" over {len(pairs)} turns" if len(pairs) > 1 else ""
    lost = (
        f"{answers - kept} of {answers} answer tokens are lost"
        if kept < answers
        else ("the question is cut, the answer is whole")
    )
    return f"{full} tokens{turns}, {left} stay: {lost}"


def _judge_text(pipeline: DataPipeline, row: AlignedRow, number: int, part: Part) -> None:
    """A text of pre-training: cut at cutoff_len, or with packing joined with the others.

    Source: data/processor/pretrain.py; no token of a text is without loss.
    """
    tokenizer, data_args = pipeline.codec.tokenizer, pipeline.data_args
    end = "<|end_of_text|>" if data_args.template == "llama3" else tokenizer.eos_token
    text = row["_prompt"][0]["content"] + end
    if not data_args.packing and getattr(tokenizer, "add_bos_token", False):
        text = tokenizer.bos_token + text
    full = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    length = full if data_args.packing else min(full, data_args.cutoff_len)
    part.kept.append(number)
    part.lengths.append(length)
    part.full[full] += 1
    part.trained_tokens += length
    if length < full:
        part.note("truncated", number, f"{full} tokens, {length} stay: the rest is lost")


def _control_words(pipeline: DataPipeline) -> re.Pattern[str] | None:
    """What is a token of its own to the tokenizer and must not stand in a text."""
    thought = tuple(getattr(pipeline.codec.template, "thought_words", ()) or ())
    added = pipeline.codec.tokenizer.added_tokens_decoder.values()
    words = {token.content for token in added if token.special} - {word.strip() for word in thought}
    return re.compile("|".join(map(re.escape, sorted(words)))) if words else None


def _inspect(
    pipeline: DataPipeline,
    row: AlignedRow,
    ids: Sequence[int],
    number: int,
    part: Part,
    words: re.Pattern[str] | None,
) -> None:
    """Look for text the tokenizer loses or takes for control, and for reasoning."""
    texts = [str(message["content"]) for message in (*row["_prompt"], *row["_response"])]
    answer = texts[-1]
    part.counts["think" if "<think>" in answer and "</think>" in answer else "no_think"] += 1
    for text in texts:
        if words is not None and (match := words.search(text)):
            reason = f"the text holds {match.group()}, which the model reads as a control token"
            part.note("control", number, reason)
            break
    tokenizer = pipeline.codec.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and unknown != tokenizer.eos_token_id:
        part.note("unknown", number, f"{_missing(pipeline, texts)} is unknown to the tokenizer")
        return
    if len(texts) == 2 and "<think>" not in answer:
        # A sample: reading all of a long text back would double the work.
        lost = _missing(pipeline, [text[:200] for text in texts], quoted=False)
        if lost:
            part.note("unknown", number, f"the tokenizer loses {lost!r}")


def _missing(pipeline: DataPipeline, texts: Sequence[str], quoted: bool = True) -> str:
    """Return characters that decode(encode(text)) does not give back."""
    tokenizer = pipeline.codec.tokenizer
    lost: dict[str, None] = {}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _normal(text) != _normal(back):
            kept = set(_normal(back))
            lost |= dict.fromkeys(c for c in _normal(text) if c not in kept and not c.isspace())
    shown = "".join(lost)[:10]
    return repr(shown) if quoted else shown


def _normal(text: str) -> str:
    # Tokenizers may compose characters (NFC, NFKC); none may lose any.
    return unicodedata.normalize("NFKC", text).strip()


def replay(config: Config, workers: int, scratch: str, rows_file: Path | None = None) -> Replay:
    """Return what becomes of every row, and the steps that the training takes.

    `rows_file` gets {"dataset", "row", "kind", "reason"} for each row that is dropped, cut, or
    holds what the tokenizer does not know.
    """
    import datasets

    datasets.disable_progress_bars()
    pipeline = DataPipeline.of(config, scratch)
    names, held = _names(config.get("dataset")), _names(config.get("eval_dataset"))
    if not names:
        raise UsageError("the config names no data set; write dataset: KEY")
    parts: dict[str, Part] = {}
    done = 0
    tables = pipeline.rows(list(dict.fromkeys([*names, *held])))
    total = sum(len(table) for table in tables.values())
    with contextlib.ExitStack() as stack:
        listing = stack.enter_context(rows_file.open("w", encoding="utf-8")) if rows_file else None
        for name, table in tables.items():
            parts[name] = Part()
            for part in _judged(pipeline, table, workers):
                if listing is not None:
                    listing.writelines(_line(name, note) for note in part.notes)
                parts[name].add(part)
                done += part.rows
                print(json.dumps({"done": done, "total": total}), flush=True)
    return Replay(
        datasets=parts,
        train=names,
        eval=held,
        cutoff_len=pipeline.data_args.cutoff_len,
        packing=bool(pipeline.data_args.packing),
        template=config.get("template"),
        reasoning=type(pipeline.codec.template).__name__.startswith("Reasoning"),
        enable_thinking=pipeline.data_args.enable_thinking,
        steps=_steps(pipeline, parts, names),
    )


def _line(name: str, note: RowNote) -> str:
    return json.dumps({"dataset": name, **asdict(note)}, ensure_ascii=False) + "\n"


def _names(listed: Any) -> list[str]:
    words = listed.split(",") if isinstance(listed, str) else listed or []
    return [str(word).strip() for word in words if str(word).strip()]


_shared: tuple[DataPipeline, Table] | None = None  # what forked workers inherit


def _judged(pipeline: DataPipeline, table: Table, workers: int) -> Iterator[Part]:
    """Yield a part for each slice of the table, in order, from `workers` processes."""
    global _shared
    starts = range(0, len(table), _SLICE)
    if workers < 2 or len(starts) < 2 * workers:
        for start in starts:
            yield judge(pipeline, _slice(table, start), start + 1)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _shared = (pipeline, table)
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(_judge_slice, starts, chunksize=2)


def _judge_slice(start: int) -> Part:
    assert _shared is not None
    pipeline, table = _shared
    return judge(pipeline, _slice(table, start), start + 1)


def _slice(table: Table, start: int) -> list[AlignedRow]:
    columns = table[start : start + _SLICE]
    rows: Any = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return list(rows)


def _steps(pipeline: DataPipeline, parts: Mapping[str, Part], names: Sequence[str]) -> Steps:
    from datasets import Dataset
    from llamafactory.data.data_utils import split_dataset

    arguments, data_args = pipeline.training_args, pipeline.data_args
    of_row = {
        (name, row): length
        for name in dict.fromkeys(names)
        for row, length in zip(parts[name].kept, parts[name].lengths, strict=True)
    }
    merged = passes.merged(pipeline, {name: parts[name].rows for name in names}, names)
    rows = [row for row in merged if row in of_row]
    if data_args.packing:
        lengths = passes.packs(pipeline, merged, of_row)
    else:
        lengths = [of_row[row] for row in rows]
    validation: list[tuple[str, int]] = []
    if lengths and data_args.val_size > 1e-6:
        places = Dataset.from_dict({"place": list(range(len(lengths)))})
        try:
            split = split_dataset(places, None, data_args, seed=arguments.seed)
        except ValueError:
            message = (
                f"val_size is {data_args.val_size:g} of {len(lengths)} sequences: none is left"
            )
            raise UsageError(f"{message} to train on", hint="write a smaller `val_size`") from None
        if not data_args.packing:
            validation = [rows[place] for place in split["validation"]["place"]]
        lengths = [lengths[place] for place in split["train"]["place"]]
    micro = max(int(arguments.per_device_train_batch_size), 1)
    return Steps(
        validation=validation,
        taken=dict(Counter(name for name, _ in rows)),
        seen=dict(Counter(name for name, _ in set(rows))),
        sequences=len(lengths),
        batch_size=micro,
        accumulation=int(arguments.gradient_accumulation_steps),
        epochs=float(arguments.num_train_epochs),
        max_steps=int(arguments.max_steps),
        drop_last=bool(arguments.dataloader_drop_last),
        tokens_an_epoch=sum(lengths),
        padded_tokens_an_epoch=padded(lengths, micro, arguments.seed),
    )


def padded(lengths: Sequence[int], batch: int, seed: int) -> int:
    """Return tokens of a pass with the padding: a batch is as long as its longest row.

    The rows are shuffled as a training shuffles them, by another generator: an estimate.
    The collator pads to multiples of 8 (data/collator.py).
    """
    order = list(lengths)
    random.Random(seed).shuffle(order)  # noqa: S311 (no secret)
    groups = (order[start : start + batch] for start in range(0, len(order), batch))
    return sum(math.ceil(max(group) / 8) * 8 * len(group) for group in groups)


def main(request: Path, result: Path) -> int:
    """Replay and write the result; what LLaMA-Factory refuses goes there as {"error"}."""
    options = read_json(request)
    with tempfile.TemporaryDirectory(prefix="tunesmith-replay-") as scratch:
        try:
            rows_file = Path(options["rows"]) if options.get("rows") else None
            workers = int(options.get("workers", 1))
            answer = replay(options["config"], workers, scratch, rows_file).record()
        except UsageError as error:
            answer = {"error": error.line}
    write_json(result, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
