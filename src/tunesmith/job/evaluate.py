"""Held-out loss and answers, before and after training: the same rows, the same prompts."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.files import read_json, write_json, write_text
from tunesmith.job import inference
from tunesmith.job.failures import JobError
from tunesmith.job.held_out import HeldOut, Item, check_round_trip, load_held_out, texts_of
from tunesmith.job.inference import Answer, Loaded, Question, Sampling

IGNORED = -100  # LLaMA-Factory's IGNORE_INDEX: positions without loss
# Bytes the logits of one batch may take as float32, with one copy of them.
_LOGITS_BUDGET = 1_000_000_000


def run(
    run_dir: Path, request: dict[str, Any], emit: Callable[..., None], phase: str
) -> dict[str, Any]:
    """Measure the model before or after training and return the figures.

    Writes RUN/<phase>.jsonl and the key <phase> of RUN/evaluation.json. Losses are in nat a
    trained token, weighted by tokens. Raises UsageError for a request that cannot be asked,
    JobError of class `data` when the tokenizer loses text, of class `nan` for a loss that is
    no number.
    """
    started = time.monotonic()
    config = inference.read_config(run_dir)
    settings = request.get("evaluate", {})
    prompts = [_item(number, entry) for number, entry in enumerate(request.get("prompts", []), 1)]
    output = Path(config["output_dir"])
    args = (
        inference.base_arguments(config)
        if phase == "before"
        else inference.tuned_arguments(config, output)
    )
    codec = inference.codec(args)
    held_out = load_held_out(config, codec, int(settings.get("held_out_answers", 8)))
    items = [*held_out.items, *prompts]
    check_round_trip(codec.tokenizer, [text for item in items for text in texts_of(item)])
    loaded = inference.load(codec)
    batch_size = int(settings.get("batch_size", 32))

    def report(unit: str, total: int) -> Callable[[int], None]:
        return lambda done: emit("progress", phase=phase, done=done, total=total, unit=unit)

    loss, tokens = None, 0
    if held_out.rows:
        loss, tokens = mean_loss(loaded, held_out, batch_size, report("rows", len(held_out.rows)))
    sampling = Sampling(
        max_new_tokens=int(settings.get("max_new_tokens", 64)), seed=int(config.get("seed", 42))
    )
    answers = inference.generate(
        loaded,
        [item.question for item in items],
        sampling,
        batch_size,
        report("answers", len(items)),
    )
    records = [_record(item, answer) for item, answer in zip(items, answers, strict=True)]
    met = [record["met"] for record in records if record["met"] is not None]
    entry: dict[str, Any] = {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "tokens": tokens,
        "rows": len(held_out.rows),
        "seconds": round(time.monotonic() - started, 1),
        "expected": {"met": sum(met), "of": len(met)} if met else None,
        "generation": sampling.record() | {"batch_size": batch_size},
        "dtype": loaded.dtype,
        "device": loaded.device,
        "answers": {"held_out": len(held_out.items), "prompts": len(prompts)},
        "omitted": {"loss": held_out.no_loss, "held_out_answers": held_out.no_answers},
    }
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(run_dir / f"{phase}.jsonl", lines)
    both = run_dir / "evaluation.json"
    write_json(both, (read_json(both) if both.is_file() else {}) | {phase: entry})
    return entry


def _item(number: int, entry: Mapping[str, Any]) -> Item:
    expect = entry.get("expect")
    try:
        re.compile(expect or "")
    except re.error as error:
        raise UsageError(
            f"prompt {number}: expect {expect!r} is not a regular expression ({error}): mend it"
        ) from error
    prompt = entry["prompt"]
    return Item(
        question=Question.of(prompt, entry.get("system")),
        shown=prompt,
        origin="prompts",
        reference=entry.get("reference"),
        expect=expect,
    )


def _record(item: Item, answer: Answer) -> dict[str, Any]:
    met = None if item.expect is None else re.search(item.expect, answer.text) is not None
    return {
        "prompt": item.shown,
        "answer": answer.text,
        "reference": item.reference,
        "set": item.origin,
        "expect": item.expect,
        "met": met,
        "tokens": answer.tokens,
        "finished": answer.finished,
    }


def mean_loss(
    loaded: Loaded,
    held_out: HeldOut,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Return (mean loss in nat over all trained tokens of the rows, number of these tokens).

    Rows of like length share a batch. The trainer's eval_loss is another figure: a mean of
    batch means, and in the training dtype. Raises JobError (class nan) when it is no number.
    """
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    model, codec = loaded.model, loaded.codec
    collate = SFTDataCollatorWith4DAttentionMask(
        template=codec.template,
        model=model,
        label_pad_token_id=IGNORED,
        block_diag_attn=held_out.neat_packing,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        compute_dtype=model.dtype,
        tokenizer=codec.tokenizer,
        processor=codec.processor,
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = sorted(held_out.rows, key=lambda row: len(row["input_ids"]))
    total, tokens, done = 0.0, 0, 0
    for batch in _batches(rows, batch_size, _LOGITS_BUDGET // (8 * vocabulary)):
        inputs = collate([dict(row) for row in batch])
        labels = inputs.pop("labels")[:, 1:]
        trained = labels != IGNORED
        with torch.inference_mode():
            inputs = {
                key: value.to(model.device) if torch.is_tensor(value) else value
                for key, value in inputs.items()
            }
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            chosen = logits[trained.to(logits.device)].float()
            loss = torch.nn.functional.cross_entropy(
                chosen, labels[trained].to(chosen.device), reduction="sum"
            )
        total += float(loss)
        tokens += int(trained.sum())
        done += len(batch)
        if progress is not None:
            progress(done)
    if tokens == 0:
        raise JobError("data", "no validation row has a trained token: raise cutoff_len")
    if not math.isfinite(total):
        raise JobError("nan", f"the held-out loss is {total}: the weights hold NaN or infinity")
    return total / tokens, tokens


def _batches(
    rows: Sequence[dict[str, Any]], batch_size: int, token_budget: int
) -> list[list[dict[str, Any]]]:
    """Group rows, sorted by length, into batches of bounded rows and padded tokens."""
    batches: list[list[dict[str, Any]]] = []
    for row in rows:
        length = len(row["input_ids"])
        fits = batches and len(batches[-1]) < batch_size
        if fits and (len(batches[-1]) + 1) * length <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
