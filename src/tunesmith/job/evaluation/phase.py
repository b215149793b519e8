"""Held-out loss and answers before and after training, with the same rows and prompts.

The guard set (general prompts unrelated to the training) is evaluated too: a higher loss there
shows what the model has forgotten.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tunesmith.core.documents import TokenizedRow
from tunesmith.core.errors import UsageError
from tunesmith.core.files import locked, read_json, write_json, write_text
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Answer, Codec, LoadedModel, Question, Sampling
from tunesmith.job.inference.validation_rows import (
    HeldOut,
    Item,
    can_say,
    check_round_trip,
    load_held_out,
    texts_of,
)
from tunesmith.job.prompts.parity import Probe, trained
from tunesmith.job.run import config as run_config
from tunesmith.job.run import seals
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.schema import PromptItem, RunRequest

IGNORED = -100  # LLaMA-Factory's IGNORE_INDEX: positions without loss
# Limit in bytes for the logits of one batch in float32, including one copy.
_LOGITS_BUDGET = 1_000_000_000
_GUARD_TOKENS = 32
_SHORT = 16  # longest reference, in characters, for exact match: a label, a number, a name


@dataclass(frozen=True)
class Share:
    """How many of a number of answers match their expectation."""

    met: int
    of: int


@dataclass(frozen=True)
class AnswerRecord:
    """A line of RUN/<phase>.jsonl."""

    prompt: str
    answer: str
    reference: str | None
    set: str  # held_out, prompts or guard
    expect: str | None  # a regular expression
    met: bool | None  # None: no expectation
    tokens: int  # of the answer, with its stop token
    finished: bool


@dataclass(frozen=True)
class Forgetting:
    """The model's results on the guard set; losses as in Measurement."""

    loss: float | None
    perplexity: float | None
    tokens: int
    rows: int
    expected: Share | None
    max_new_tokens: int


@dataclass(frozen=True)
class Measurement:
    """The results of one phase in RUN/evaluation.json."""

    loss: float | None  # nat per trained token
    perplexity: float | None
    tokens: int  # number of trained tokens in the mean
    rows: int
    seconds: float
    expected: Share | None  # of the run's prompts
    guard: Forgetting | None
    scores: Mapping[str, Scores]  # by set
    generation: Mapping[str, int | float | bool]
    dtype: str
    device: str
    answers: Mapping[str, int]  # by set
    omitted: Mapping[str, str | None]  # missing results, and why


# ROUGE and BLEU by LLaMA-Factory's names, 0 to 100; "of": how many answers; "exact": a Share.
Scores = Mapping[str, object]


def run(
    run_dir: Path, request: RunRequest, emit: Callable[..., None], phase: str
) -> dict[str, Any]:
    """Evaluate the model before or after training and return the results.

    Writes RUN/<phase>.jsonl and the key <phase> of RUN/evaluation.json. Losses are in nat per
    trained token, weighted by tokens; ROUGE and BLEU are LLaMA-Factory's, 0 to 100. Raises
    UsageError for an invalid request, JobError of class `data` if the tokenizer loses text, of
    class `nan` if a loss is NaN or infinite.
    """
    started = time.monotonic()
    config = run_config.read_config(run_dir)
    settings = request.evaluate
    prompts = _items(request.prompts, "prompts")
    guard = _items(request.guard, "guard")
    output = Path(config["output_dir"])
    args = (
        engine.base_arguments(config)
        if phase == "before"
        else engine.tuned_arguments(config, output)
    )
    codec = engine.codec(args)
    held_out = load_held_out(config, codec, settings.held_out_answers)
    own = [*held_out.items, *prompts]
    check_round_trip(codec.tokenizer, [text for item in own for text in texts_of(item)])
    sayable = [item for item in guard if can_say(codec.tokenizer, item)]
    lost, guard = len(guard) - len(sayable), sayable
    items = [*own, *guard]
    loaded = engine.load(codec)
    batch_size = settings.batch_size

    def report(unit: str, total: int) -> Callable[[int], None]:
        return lambda done: emit("progress", phase=phase, done=done, total=total, unit=unit)

    loss, tokens = None, 0
    if held_out.rows:
        loss, tokens = mean_loss(loaded, held_out, batch_size, report("rows", len(held_out.rows)))
    guarded = _guard_rows(codec, guard)
    guard_loss, guard_tokens = None, 0
    if guarded.rows:
        guard_loss, guard_tokens = mean_loss(loaded, guarded, batch_size)
    sampling = Sampling(max_new_tokens=settings.max_new_tokens, seed=int(config.get("seed", 42)))
    # The guard set separately, with fewer tokens: one sentence is enough for an answer.
    brief = replace(sampling, max_new_tokens=min(_GUARD_TOKENS, sampling.max_new_tokens))
    on_answers = report("answers", len(items))
    answers = [
        *engine.generate(loaded, [i.question for i in own], sampling, batch_size, on_answers),
        *engine.generate(
            loaded,
            [item.question for item in guard],
            brief,
            batch_size,
            lambda done: on_answers(len(own) + done),
        ),
    ]
    records = [_record(item, answer) for item, answer in zip(items, answers, strict=True)]
    by_set = {
        name: [record for record in records if record.set == name]
        for name in ("held_out", "prompts", "guard")
    }
    omitted = {"loss": held_out.no_loss, "held_out_answers": held_out.no_answers}
    if lost:
        omitted["guard"] = f"{lost} prompts with text the tokenizer loses"
    forgetting = Forgetting(
        loss=guard_loss,
        perplexity=_perplexity(guard_loss),
        tokens=guard_tokens,
        rows=len(guarded.rows),
        expected=_met(by_set["guard"]),
        max_new_tokens=brief.max_new_tokens,
    )
    measured = Measurement(
        loss=loss,
        perplexity=_perplexity(loss),
        tokens=tokens,
        rows=len(held_out.rows),
        seconds=round(time.monotonic() - started, 1),
        expected=_met(by_set["prompts"]),
        guard=forgetting if guard else None,
        scores={
            name: result
            for name, rows in by_set.items()
            if (result := scores(codec.tokenizer, rows)) is not None
        },
        generation=sampling.record() | {"batch_size": batch_size},
        dtype=loaded.dtype,
        device=loaded.device,
        answers={name: len(rows) for name, rows in by_set.items()},
        omitted=omitted,
    )
    entry = asdict(measured)
    lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
    both = run_dir / "evaluation.json"
    with locked(both), seals.rewriting(run_dir, phase, f"{phase}.jsonl", both.name):
        write_text(run_dir / f"{phase}.jsonl", lines)
        write_json(both, (read_json(both) if both.is_file() else {}) | {phase: entry})
    return entry


def _items(entries: Sequence[PromptItem], origin: str) -> list[Item]:
    return [_item(number, entry, origin) for number, entry in enumerate(entries, 1)]


def _item(number: int, entry: PromptItem, origin: str) -> Item:
    expect = entry.expect
    try:
        re.compile(expect or "")
    except re.error as error:
        raise UsageError(
            f"{origin} {number}: expect {expect!r} is not a regular expression ({error})"
        ) from error
    prompt = entry.prompt
    return Item(
        question=Question.of(prompt, entry.system),
        shown=prompt,
        origin=origin,
        reference=entry.reference,
        expect=expect,
    )


def _record(item: Item, answer: Answer) -> AnswerRecord:
    met = None if item.expect is None else re.search(item.expect, answer.text) is not None
    return AnswerRecord(
        prompt=item.shown,
        answer=answer.text,
        reference=item.reference,
        set=item.origin,
        expect=item.expect,
        met=met,
        tokens=answer.tokens,
        finished=answer.finished,
    )


def _guard_rows(codec: Codec, guard: Sequence[Item]) -> HeldOut:
    """Return the reference answers as rows with labels, encoded like training rows."""
    rows: list[TokenizedRow] = []
    for item in guard:
        if item.reference:
            probe = Probe("", item.question.messages, item.reference, item.question.system)
            source, target = trained(codec, probe)
            rows.append(
                {
                    "input_ids": [*source, *target],
                    "attention_mask": [1] * (len(source) + len(target)),
                    "labels": [IGNORED] * len(source) + target,
                    "images": None,
                    "videos": None,
                    "audios": None,
                }
            )
    return HeldOut(rows, list(guard), False, None, None)


def _met(records: Sequence[AnswerRecord]) -> Share | None:
    judged = [record.met for record in records if record.met is not None]
    return Share(sum(judged), len(judged)) if judged else None


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))


def scores(tokenizer: Any, records: Sequence[AnswerRecord]) -> Scores | None:
    """Return ROUGE, BLEU and exact matches of answers with a reference, None if there are none.

    ROUGE and BLEU are those of `inv predict`: LLaMA-Factory's ComputeSimilarity itself
    (train/sft/metric.py), 0 to 100. Exact match counts only references so short that a correct
    answer has hardly any other form.
    """
    import numpy as np
    from llamafactory.train.sft.metric import ComputeSimilarity

    judged = [(record.answer, record.reference) for record in records if record.reference]
    if not judged:
        return None

    def padded(texts: Sequence[str]) -> Any:
        # int64 [texts, longest], padded with IGNORED.
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        longest = max(1, *map(len, rows))
        return np.array([row + [IGNORED] * (longest - len(row)) for row in rows])

    answers, references = zip(*judged, strict=True)
    pairs = SimpleNamespace(predictions=padded(answers), label_ids=padded(references))
    figures: Mapping[str, float] = ComputeSimilarity(tokenizer)(pairs) or {}
    result: dict[str, object] = {key: round(value, 4) for key, value in figures.items()}
    result["of"] = len(judged)
    short = [(answer, reference) for answer, reference in judged if len(reference) <= _SHORT]
    if short:
        same = sum(answer.strip() == reference.strip() for answer, reference in short)
        result["exact"] = asdict(Share(same, len(short)))
    return result


def mean_loss(
    loaded: LoadedModel,
    held_out: HeldOut,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Return (mean loss in nat over all trained tokens of the rows, number of these tokens).

    Rows of similar length share a batch. The trainer's eval_loss differs: it is a mean of batch
    means, in the training dtype. Raises JobError (class nan) if the loss is NaN or infinite.
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
        # All int64 [rows, length]; the logits are [rows, length, vocabulary].
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
        raise JobError("nan", f"the held-out loss is {total}: the weights contain NaN or infinity")
    return total / tokens, tokens


def _batches(
    rows: Sequence[TokenizedRow], batch_size: int, token_budget: int
) -> list[list[TokenizedRow]]:
    """Group rows, sorted by length, into batches of bounded rows and padded tokens."""
    batches: list[list[TokenizedRow]] = []
    for row in rows:
        length = len(row["input_ids"])
        fits = batches and len(batches[-1]) < batch_size
        if fits and (len(batches[-1]) + 1) * length <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
