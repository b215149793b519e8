"""The behaviour part of the proof: merged model against base + unmerged adapter, in float32.

Two comparisons of logits. `logits_unrounded` undoes the only change that a correct merge may
make, rounding each target weight once (proof/weights.py bounds it by half a unit in the last
place): the merged model with float32(W) + scale * B @ A in its targets must give PEFT's logits up
to float32 arithmetic, so this comparison is sharp. `logits` uses the merged model as stored and
shows the effect of rounding, relative to the adapter's effect. No fixed limit fits the second: on
SmolLM2-135M a correct bfloat16 merge changed logits by 0.007 to 0.15 on average, depending on the
size of the adapter, and small changes of a weight are all lost in the same direction, so random
rounding noise (0.05) is no measure for it either.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Codec, Question, Sampling
from tunesmith.job.merge.adapter import AdapterFacts
from tunesmith.job.merge.phase import check_room, parameter_count
from tunesmith.job.merge.weights import TensorReader, lora_pairs, row_parts
from tunesmith.job.proof.weights import Check, not_plain
from tunesmith.job.run.schema import RunRequest

_POSITIONS = 256  # compared logits: positions of all texts together
_TEXT = 128  # token ids per text
_QUESTIONS = 10
NEW_TOKENS = 32  # per greedy answer
_FALLBACK = ("Hello, who are you?", "你好，你是谁？")


@dataclass(frozen=True)
class Distance:
    """The distance between two sets of logits [positions, vocabulary], float32."""

    mean: float  # mean absolute difference
    max: float  # largest absolute difference
    kl: float  # mean Kullback-Leibler divergence over positions, nat

    def record(self) -> dict[str, float]:
        """Return the three figures with six significant digits."""
        return {key: float(f"{value:.6g}") for key, value in vars(self).items()}


# float32 arithmetic: W'x and Wx + s B(Ax) add in a different order. Measured on SmolLM2-135M:
# correct merge: mean 1e-5, max 1.1e-4, KL 1.2e-11; smallest planted fault, one of 210 modules
# not merged: mean 0.033, max 0.5, KL 1.2e-4; scale wrong by a tenth: 0.2, 3.3, 5e-3.
UNROUNDED = Distance(mean=1e-3, max=2e-2, kl=1e-6)
# Share of the adapter's effect that rounding may remove. Beyond LOST the merged model is no closer
# to the tuned one than the base is; beyond NOTED the user should know. For an adapter that cannot
# be recomputed this is the only evidence, so NOTED is its limit.
NOTED, LOST = 0.25, 1.0


@dataclass(frozen=True)
class Tolerance:
    """The limits of a proof's comparisons, kept in proof.json."""

    compute: str  # dtype and device of the forward passes
    merged_dtype: str
    weights: str  # bound of a weight's error
    logits_unrounded: Mapping[str, float]
    logits_share_of_effect: float
    near_tie: float  # two logits no further apart than this are a tie


def questions(request: RunRequest, run_dir: Path) -> list[tuple[Question, str]]:
    """Return (question, possible answer) pairs from the run's prompts and held-out answers."""
    pairs = [
        (Question.of(entry.prompt, entry.system), entry.reference or "")
        for entry in request.prompts
    ]
    measured = run_dir / "before.jsonl"
    if measured.is_file():
        records = [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()]
        pairs += [
            (Question.of(record["prompt"]), record["reference"] or "")
            for record in records
            if record["set"] == "held_out"
        ]
    return pairs or [(Question.of(text), "") for text in _FALLBACK]


def tokenizer_check(base: Path, merged: Path, pairs: Sequence[tuple[Question, str]]) -> Check:
    """Check that the merged folder's tokenizer gives the base tokenizer's ids."""
    from transformers import AutoTokenizer

    ours, theirs = (
        AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        for folder in (merged, base)
    )
    texts = [text for question, after in pairs for text in _texts(question, after)]
    differing = [
        text
        for text in texts
        if ours.encode(text, add_special_tokens=False)
        != theirs.encode(text, add_special_tokens=False)
    ]
    detail = (
        f"{differing[0][:40]!r} gets different ids than from the base's tokenizer"
        if differing
        else "the same ids as from the base's tokenizer"
    )
    return Check(
        "tokenizer", not differing, detail, {"texts": len(texts), "differing": len(differing)}
    )


def _texts(question: Question, after: str) -> list[str]:
    return [str(m["content"]) for m in question.messages] + ([after] if after else [])


def behaviour_checks(
    base: Path,
    adapters: Sequence[str],
    merged: Path,
    facts: AdapterFacts,
    codec: Codec,
    pairs: Sequence[tuple[Question, str]],
    dtype: str,
    new_tokens: int = NEW_TOKENS,
) -> tuple[list[Check], Tolerance]:
    """Compare logits and greedy answers of base + adapter and of the merged model in float32.

    Returns the checks and their limits. One model at a time is in memory. Raises JobError if
    memory does not suffice for float32.
    """
    import torch

    reasons = not_plain(facts, len(adapters))
    need = int(1.25 * 4 * parameter_count(base)) + 1_500_000_000
    device = "cpu"
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > need:
        device = "cuda"
    else:
        check_room(merged.parent, disk=0, memory=need)
    prompts = [codec.encode(question) for question, _ in pairs][:_QUESTIONS]
    sequences = _sequences(codec, pairs)
    stop, pad = codec.stop_ids(), codec.tokenizer.pad_token_id
    sampling = Sampling(max_new_tokens=new_tokens)
    remote = bool(codec.model_args.trust_remote_code)

    model = _with_adapters(plain_model(base, device, remote), adapters)
    with_adapter = logits(model, sequences)
    with model.disable_adapter():
        without = logits(model, sequences)
    expected = engine.generate_ids(model, prompts, stop, pad, sampling)
    del model
    gc.collect()

    model = plain_model(merged, device, remote)
    from_merged = logits(model, sequences)
    answers = engine.generate_ids(model, prompts, stop, pad, sampling)
    gaps = [
        _gap(model, prompt, one, other)
        for prompt, one, other in zip(prompts, expected, answers, strict=True)
        if one != other
    ]
    sharp = None
    if not reasons:
        undo_rounding(model, base, facts, dtype)
        sharp = distance(with_adapter, logits(model, sequences))
    del model
    gc.collect()

    apart, moved = distance(with_adapter, from_merged), distance(with_adapter, without)
    near = 2 * apart.max + UNROUNDED.max
    tolerance = Tolerance(
        compute=f"float32 on {device}",
        merged_dtype=dtype,
        weights="0.5 ulp + (rank + 3) 2^-22 (|W| + scale |B||A|)",
        logits_unrounded=UNROUNDED.record(),
        logits_share_of_effect=LOST if sharp else NOTED,
        near_tie=float(f"{near:.6g}"),
    )
    return [
        _unrounded_check(sharp, reasons, sum(len(sequence) for sequence in sequences)),
        _logits_check(apart, moved, LOST if sharp else NOTED, dtype),
        _answers_check(gaps, len(prompts), near),
    ], tolerance


def _unrounded_check(sharp: Distance | None, reasons: Sequence[str], positions: int) -> Check:
    name = "logits_unrounded"
    if sharp is None:
        return Check(name, None, f"not recomputed: {', '.join(reasons)}", {})
    limits = vars(UNROUNDED)
    # `not <=` instead of `>`, so that NaN fails.
    beyond = [key for key, value in vars(sharp).items() if not value <= limits[key]]
    detail = ", ".join(
        f"{key} {value:.2g} (at most {limits[key]:.2g})" for key, value in vars(sharp).items()
    )
    return Check(name, not beyond, detail, {**sharp.record(), "positions": positions})


def _logits_check(apart: Distance, moved: Distance, limit: float, dtype: str) -> Check:
    """Check how much of the adapter's effect on the logits remains in the merged dtype."""
    figures = {"merge": apart.record(), "adapter": moved.record()}
    if not moved.max > 0:
        return Check("logits", False, "the adapter changes no logit: it has no effect", figures)
    share = apart.mean / moved.mean
    figures["share"] = {"mean": float(f"{share:.6g}")}
    detail = (
        f"the adapter changes logits by {moved.mean:.3g} on average, "
        f"rounding to {dtype} by {apart.mean:.3g} ({share:.1%})"
    )
    if not share <= NOTED:
        detail += ": much of the adapter is lost; infer_dtype: float32 preserves it"
    return Check("logits", share <= limit, detail, figures)


def _answers_check(gaps: Sequence[float], prompts: int, near: float) -> Check:
    beyond = [gap for gap in gaps if not gap <= near]
    same = prompts - len(gaps)
    detail = f"{same} of {prompts} greedy answers equal"
    if gaps:
        detail += f", the others differ after two tokens within {max(gaps):.3g}"
    figures = {"answers": prompts, "equal": same, "gaps": [float(f"{gap:.6g}") for gap in gaps]}
    return Check("answers", not beyond, detail, figures)


def _sequences(codec: Codec, pairs: Sequence[tuple[Question, str]]) -> list[list[int]]:
    """Return the ids of prompts with their references, truncated to the budget of positions."""
    sequences: list[list[int]] = []
    remaining = _POSITIONS
    for question, after in pairs:
        ids = codec.encode(question)
        ids += codec.tokenizer.encode(after, add_special_tokens=False) if after else []
        ids = ids[: min(_TEXT, remaining)]
        remaining -= len(ids)
        if ids:
            sequences.append(ids)
    return sequences


def plain_model(folder: Path, device: str, remote: bool) -> Any:
    """Load a model with plain transformers in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    options = {"trust_remote_code": remote, "local_files_only": True}
    config = AutoConfig.from_pretrained(str(folder), **options)
    composite = type(config) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if composite else AutoModelForCausalLM
    model = kind.from_pretrained(
        str(folder), torch_dtype=torch.float32, use_safetensors=True, **options
    )
    return model.to(device).eval().requires_grad_(False)


def _with_adapters(model: Any, adapters: Sequence[str]) -> Any:
    """Return the model with the last adapter unmerged and earlier ones merged below it."""
    from peft import PeftModel

    for folder in adapters[:-1]:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return PeftModel.from_pretrained(model, adapters[-1]).eval()


def logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[Any]:
    """Return the logits of each id sequence: [ids, vocabulary], float32, on the CPU."""
    import torch

    results = []
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=model.device)
            results.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return results


def distance(left: Sequence[Any], right: Sequence[Any]) -> Distance:
    """Return the distance between two lists of logits; KL is of `right` from `left`.

    Both contain [ids, vocabulary] tensors in float32, of the same shapes.
    """
    import torch

    total, count, divergence, positions = 0.0, 0, 0.0, 0
    largest = []
    for one, other in zip(left, right, strict=True):
        off = (one - other).abs()
        total += float(off.double().sum())
        count += off.numel()
        largest.append(off.max())
        p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        positions += len(one)
    # Rounding can make a divergence of zero slightly negative; NaN stays NaN and fails.
    return Distance(total / count, float(torch.stack(largest).max()), abs(divergence) / positions)


def _gap(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float:
    """Return by how much the merged model prefers its own token where two answers differ."""
    position = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    if position >= min(len(one), len(other)):
        return math.inf  # one stops where the other continues with the same ids: no tie
    at_end = logits(model, [[*prompt, *other[:position]]])[0][-1]
    return float(at_end[other[position]] - at_end[one[position]])


def undo_rounding(model: Any, base: Path, facts: AdapterFacts, dtype: str) -> None:
    """Put float32(W) + scale * B @ A into the target weights of a float32 model, in place.

    If the base has another dtype than the merged model, its other weights were rounded too; they
    are replaced by the base's (proof/weights.py checks that they are the base's, cast). `dtype` is
    safetensors' name of the merged dtype.
    """
    import torch

    merged, targets = getattr(torch, dtype), set(facts.targets.values())
    with torch.no_grad(), TensorReader(base) as reader:
        for name, weight in model.named_parameters():
            if name in reader and name not in targets:
                stored = reader.get(name)
                if stored.dtype != merged:
                    weight.copy_(stored.float())
        for module, name, a, b in lora_pairs(facts):
            weight = model.get_parameter(f"{module}.weight")
            for part in row_parts(weight.shape[0]):
                rows = reader.rows(name, part).float()
                weight[part] = torch.addmm(rows, b[part], a, alpha=facts.scale).to(weight.device)
