"""`python -m tunesmith.job.data.replay REQUEST RESULT`: LLaMA-Factory's view of a config's rows.

Its own loader, converter, template, tokenizer and processor (data/ of 0.9.3) run on every
row, before anything is trained; nothing is imitated but the arithmetic of steps. REQUEST is
JSON: {"config": train config with absolute paths, "workers": processes, "rows": file}. RESULT
is written at the end; the file gets one JSON line for each row that is not simply kept. Lines
on stdout are {"done": rows, "total": rows}.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.inference import engine

IGNORED = -100  # LLaMA-Factory's IGNORE_INDEX: a token without loss
EXAMPLES = 50  # rows of one kind that are told one by one
_SLICE = 500  # rows a process takes at once
# Keys beside the DataArguments that decide what becomes of the rows.
_TRAINING_KEYS = (
    "seed",
    "stage",
    "finetuning_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Loaded:
    """LLaMA-Factory's arguments, tokenizer and processor for one config."""

    data_args: Any
    model_args: Any
    training_args: Any
    codec: engine.Codec
    processor: Any
    stage: str

    @classmethod
    def of(cls, config: Mapping[str, Any], scratch: str) -> Loaded:
        """Load tokenizer and template (seconds), no weights; caches go to `scratch`."""
        from llamafactory.data.loader import _get_dataset_processor
        from llamafactory.hparams import DataArguments
        from llamafactory.hparams.parser import _parse_train_args

        stage = str(config.get("stage", "sft"))
        if stage not in ("sft", "pt"):
            raise UsageError(f"stage {stage}: only sft and pt configs can be replayed")
        names = {item.name for item in dataclasses.fields(DataArguments) if item.init}
        keys = {key: value for key, value in config.items() if key in names}
        for key in ("tokenized_path", "preprocessing_num_workers", "streaming"):
            keys.pop(key, None)  # they change how rows are read, not which
        keys |= {key: config[key] for key in _TRAINING_KEYS if key in config}
        keys |= {"output_dir": f"{scratch}/output", "report_to": "none", "overwrite_cache": True}
        base = engine.base_arguments(config)
        model_args, data_args, training_args, _, _ = _parse_train_args({**base, **keys})
        if data_args.packing is None:
            data_args.packing = stage == "pt"  # as get_train_args derives it
        codec = engine.codec(base)
        model_args.cache_dir = f"{scratch}/cache"
        processor = _get_dataset_processor(
            data_args, stage, codec.template, codec.tokenizer, codec.processor
        )
        return cls(data_args, model_args, training_args, codec, processor, stage)

    def rows(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the rows of each data set as LLaMA-Factory's converter leaves them."""
        from llamafactory.data.loader import _get_merged_dataset

        context = (self.model_args, self.data_args, self.training_args)
        found: dict[str, Any] = {}
        for name in names:
            found |= _get_merged_dataset([name], *context, self.stage, return_dict=True)
        return found

    def encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[tuple[Any, Any]]]:
        """Return (ids, labels, (question ids, answer ids) of each turn before any cut)."""
        recorder = _Recorder(self.codec.template)
        processor = dataclasses.replace(self.processor, template=recorder)
        ids, labels = processor._encode_data_example(
            prompt=row["_prompt"],
            response=row["_response"],
            system=row["_system"],
            tools=row["_tools"],
            images=row["_images"] or [],
            videos=row["_videos"] or [],
            audios=row["_audios"] or [],
        )
        return ids, labels, recorder.pairs


class _Recorder:
    """The template, which keeps the turns it has encoded: their lengths before the cut."""

    def __init__(self, template: Any) -> None:
        self._template = template
        self.pairs: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)

    def encode_multiturn(self, *arguments: Any) -> Any:
        self.pairs = self._template.encode_multiturn(*arguments)
        return self.pairs


@dataclass
class Part:
    """What is known of some rows of one data set; parts of all rows are added up."""

    rows: int = 0
    kept: list[int] = field(default_factory=list)  # numbers of the rows, from 1
    lengths: list[int] = field(default_factory=list)  # tokens after the cut, one a kept row
    full: Counter[int] = field(default_factory=Counter)  # tokens before it: how many rows
    trained_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    told: list[dict[str, Any]] = field(default_factory=list)

    def tell(self, kind: str, row: int, reason: str) -> None:
        """Count a row of a kind, and keep the reason."""
        self.counts[kind] += 1
        self.told.append({"kind": kind, "row": row, "reason": reason})

    def add(self, other: Part) -> None:
        """Add a later part; of each kind only the first rows' reasons are kept."""
        for item in other.told:
            if sum(known["kind"] == item["kind"] for known in self.told) < EXAMPLES:
                self.told.append(item)
        self.rows += other.rows
        self.kept += other.kept
        self.lengths += other.lengths
        self.full.update(other.full)
        self.trained_tokens += other.trained_tokens
        self.counts.update(other.counts)


def judge(loaded: Loaded, rows: Sequence[Mapping[str, Any]], first: int) -> Part:
    """Encode rows of one data set, the first of which has number `first`."""
    part = Part(rows=len(rows))
    words = _control_words(loaded)
    for number, row in enumerate(rows, first):
        if loaded.stage == "sft" and (len(row["_prompt"]) % 2 != 1 or len(row["_response"]) != 1):
            part.tell("dropped", number, _why_dropped(row))
            continue
        if loaded.stage == "pt":
            _judge_text(loaded, row, number, part)
            continue
        ids, labels, pairs = loaded.encode(row)
        full = sum(len(source) + len(target) for source, target in pairs)
        full += 1 if loaded.codec.template.efficient_eos else 0
        part.full[full] += 1
        if loaded.data_args.packing and len(ids) > loaded.data_args.cutoff_len:
            part.tell("dropped", number, f"{len(ids)} tokens: packing leaves out what is longer")
            continue
        trained = sum(label != IGNORED for label in labels)
        part.kept.append(number)
        part.lengths.append(len(ids))
        part.trained_tokens += trained
        if full > len(ids):
            part.tell("truncated", number, _why_cut(full, len(ids), labels, pairs))
        if not trained:
            part.tell("untrained", number, "no token of the answer is left to train on")
        _look(loaded, row, ids, number, part, words)
    return part


def _why_dropped(row: Mapping[str, Any]) -> str:
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


def _judge_text(loaded: Loaded, row: Mapping[str, Any], number: int, part: Part) -> None:
    """A text of pre-training: joined with the others and cut into blocks, so never lost."""
    texts = [message["content"] for message in row["_prompt"]]
    ids = loaded.codec.tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    part.kept.append(number)
    part.lengths.append(len(ids) + 1)
    part.full[len(ids) + 1] += 1
    part.trained_tokens += len(ids) + 1


def _control_words(loaded: Loaded) -> re.Pattern[str] | None:
    """What is a token of its own to the tokenizer and must not stand in a text."""
    thought = tuple(getattr(loaded.codec.template, "thought_words", ()) or ())
    added = loaded.codec.tokenizer.added_tokens_decoder.values()
    words = {token.content for token in added if token.special} - {word.strip() for word in thought}
    return re.compile("|".join(map(re.escape, sorted(words)))) if words else None


def _look(
    loaded: Loaded,
    row: Mapping[str, Any],
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
        if words is not None and (found := words.search(text)):
            reason = f"the text holds {found.group()}, which the model reads as a control token"
            part.tell("control", number, reason)
            break
    tokenizer = loaded.codec.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and unknown != tokenizer.eos_token_id:
        part.tell("unknown", number, f"{_missing(loaded, texts)} is unknown to the tokenizer")
        return
    if len(texts) == 2 and "<think>" not in answer:
        # A sample: reading all of a long text back would double the work.
        lost = _missing(loaded, [text[:200] for text in texts], quoted=False)
        if lost:
            part.tell("unknown", number, f"the tokenizer loses {lost!r}")


def _missing(loaded: Loaded, texts: Sequence[str], quoted: bool = True) -> str:
    """Return characters that decode(encode(text)) does not give back."""
    tokenizer = loaded.codec.tokenizer
    lost: dict[str, None] = {}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if _normal(text) != _normal(back):
            there = set(_normal(back))
            lost |= dict.fromkeys(c for c in _normal(text) if c not in there and not c.isspace())
    shown = "".join(lost)[:10]
    return repr(shown) if quoted else shown


def _normal(text: str) -> str:
    # Tokenizers may compose characters (NFC, NFKC); none may lose any.
    return unicodedata.normalize("NFKC", text).strip()


def replay(
    config: Mapping[str, Any], workers: int, scratch: str, rows_file: Path | None = None
) -> dict[str, Any]:
    """Return what becomes of every row, and the steps that the training takes.

    `rows_file` gets {"dataset", "row", "kind", "reason"} for each row that is dropped, cut, or
    holds what the tokenizer does not know.
    """
    import datasets

    datasets.disable_progress_bars()
    loaded = Loaded.of(config, scratch)
    names, held = _names(config.get("dataset")), _names(config.get("eval_dataset"))
    if not names:
        raise UsageError("the config names no data set; write dataset: KEY")
    parts, total, done = {}, 0, 0
    tables = loaded.rows(list(dict.fromkeys([*names, *held])))
    total = sum(len(table) for table in tables.values())
    with contextlib.ExitStack() as stack:
        listing = stack.enter_context(rows_file.open("w", encoding="utf-8")) if rows_file else None
        for name, table in tables.items():
            parts[name] = Part()
            for part in _judged(loaded, table, workers):
                if listing is not None:
                    listing.writelines(_line(name, item) for item in part.told)
                parts[name].add(part)
                done += part.rows
                print(json.dumps({"done": done, "total": total}), flush=True)
    return {
        "datasets": {name: _told(part) for name, part in parts.items()},
        "train": names,
        "eval": held,
        "cutoff_len": loaded.data_args.cutoff_len,
        "packing": bool(loaded.data_args.packing),
        "template": config.get("template"),
        "reasoning": type(loaded.codec.template).__name__.startswith("Reasoning"),
        "enable_thinking": loaded.data_args.enable_thinking,
        **_training(loaded, [parts[name] for name in names], names),
    }


def _line(name: str, item: Mapping[str, Any]) -> str:
    return json.dumps({"dataset": name, **item}, ensure_ascii=False) + "\n"


def _names(listed: Any) -> list[str]:
    words = listed.split(",") if isinstance(listed, str) else listed or []
    return [str(word).strip() for word in words if str(word).strip()]


_shared: tuple[Loaded, Any] | None = None  # what forked workers inherit


def _judged(loaded: Loaded, table: Any, workers: int) -> Iterator[Part]:
    """Yield a part for each slice of the table, in order, from as many processes as asked."""
    global _shared
    starts = range(0, len(table), _SLICE)
    if workers < 2 or len(starts) < 2 * workers:
        for start in starts:
            yield judge(loaded, _slice(table, start), start + 1)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _shared = (loaded, table)
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(_judge_slice, starts, chunksize=2)


def _judge_slice(start: int) -> Part:
    assert _shared is not None
    loaded, table = _shared
    return judge(loaded, _slice(table, start), start + 1)


def _slice(table: Any, start: int) -> list[dict[str, Any]]:
    columns = table[start : start + _SLICE]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _told(part: Part) -> dict[str, Any]:
    return {
        "rows": part.rows,
        "kept": len(part.kept),
        "tokens": sum(part.lengths),
        "trained_tokens": part.trained_tokens,
        "counts": dict(part.counts),
        "told": sorted(part.told, key=lambda item: (item["kind"], item["row"])),
        "full": sorted(part.full.items()),
    }


def _training(loaded: Loaded, parts: Sequence[Part], names: Sequence[str]) -> dict[str, Any]:
    """Return the rows held out by val_size, the sequences a pass has, and the steps."""
    from datasets import Dataset
    from llamafactory.data.data_utils import split_dataset

    arguments = loaded.training_args
    lengths = [length for part in parts for length in part.lengths]
    rows = [(name, row) for name, part in zip(names, parts, strict=True) for row in part.kept]
    validation: list[tuple[str, int]] = []
    if loaded.stage == "pt":
        block = loaded.data_args.cutoff_len
        lengths = [block] * (sum(lengths) // block) if loaded.data_args.packing else lengths
    elif loaded.data_args.packing:
        lengths = _packs(lengths, loaded.data_args)
    share = loaded.data_args.val_size
    if lengths and share > 1e-6:
        places = Dataset.from_dict({"place": list(range(len(lengths)))})
        split = split_dataset(places, None, loaded.data_args, seed=arguments.seed)
        if len(lengths) == len(rows):
            validation = [rows[place] for place in split["validation"]["place"]]
        lengths = [lengths[place] for place in split["train"]["place"]]
    micro = max(int(arguments.per_device_train_batch_size), 1)
    return {
        "validation": validation,
        "sequences": len(lengths),
        "batch_size": micro,
        "accumulation": int(arguments.gradient_accumulation_steps),
        "epochs": float(arguments.num_train_epochs),
        "max_steps": int(arguments.max_steps),
        "tokens_an_epoch": sum(lengths),
        "padded_tokens_an_epoch": padded(lengths, micro, arguments.seed),
    }


def padded(lengths: Sequence[int], batch: int, seed: int) -> int:
    """Return tokens of a pass with the padding: a batch is as long as its longest row.

    The rows are shuffled as a training shuffles them, by another generator: an estimate.
    The collator pads to multiples of 8 (data/collator.py).
    """
    order = list(lengths)
    random.Random(seed).shuffle(order)  # noqa: S311 (no secret)
    groups = (order[start : start + batch] for start in range(0, len(order), batch))
    return sum(math.ceil(max(group) / 8) * 8 * len(group) for group in groups)


def _packs(lengths: Sequence[int], data_args: Any) -> list[int]:
    """Return the sequences that packing makes: per 1000 rows, as Dataset.map hands them over."""
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    made = 0
    for start in range(0, len(lengths), data_args.preprocessing_batch_size):
        some = list(lengths[start : start + data_args.preprocessing_batch_size])
        made += len(greedy_knapsack(some, data_args.cutoff_len))
    return [data_args.cutoff_len + 1] * made


def main(request: Path, result: Path) -> int:
    """Replay and write the result; what LLaMA-Factory refuses goes there as {"error"}."""
    asked = read_json(request)
    with tempfile.TemporaryDirectory(prefix="tunesmith-replay-") as scratch:
        try:
            rows_file = Path(asked["rows"]) if asked.get("rows") else None
            found = replay(asked["config"], int(asked.get("workers", 1)), scratch, rows_file)
        except UsageError as error:
            found = {"error": error.message}
    write_json(result, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
