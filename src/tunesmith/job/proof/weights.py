"""The weights' part of the proof: read from safetensors, one tensor at a time.

Every tensor outside the adapter's targets must be the base's, byte for byte after the cast;
every target must be cast(W + scale * B @ A), recomputed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from tunesmith.basemodel.files import Shapes, tensor_shapes, verify
from tunesmith.core.files import read_json
from tunesmith.job.merge import manifest
from tunesmith.job.merge.adapter import AdapterFacts
from tunesmith.job.merge.inputs import SAFETENSORS_NAMES
from tunesmith.job.merge.weights import TensorReader, lora_pairs, row_parts

# Bits of the significand with the hidden one, and the smallest subnormal as a power of two.
_SIGNIFICAND = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}


class CheckRecord(TypedDict):
    """A Check in proof.json."""

    name: str
    passed: bool | None
    skipped: bool
    detail: str
    figures: dict[str, object]


@dataclass(frozen=True)
class Check:
    """One check of the merged model. `passed` is None if it could not be performed."""

    name: str
    passed: bool | None
    detail: str
    figures: Mapping[str, object]  # measured values by name; JSON

    def record(self) -> CheckRecord:
        """Return the check's record in proof.json."""
        return {
            "name": self.name,
            "passed": self.passed,
            "skipped": self.passed is None,
            "detail": self.detail,
            "figures": dict(self.figures),
        }


def file_check(merged: Path) -> tuple[Check, manifest.Files]:
    """Check that all files exist, are complete, and are those of the merge (MANIFEST.json).

    Also returns their sizes and sha256.
    """
    files = manifest.listing(merged)
    figures = {"files": len(files), "bytes": sum(file.size for file in files.values())}
    problems = [*map(str, verify(merged)), *manifest.faults(merged, files)]
    detail = problems[0] if problems else f"{len(files)} files, each with the sha256 of the merge"
    return Check("files", not problems, detail, figures), files


def weight_checks(
    base: Path, merged: Path, facts: AdapterFacts, dtype: str, adapters: int = 1
) -> list[Check]:
    """Compare the merged tensors with the base's and with W + scale * B @ A, one at a time.

    Several `adapters`, merged in turn with a rounding each, are not recomputed.
    """
    old, new = tensor_shapes(base), tensor_shapes(merged)
    structure = _structure(base, old, new, dtype)
    if not structure.passed:
        return [structure]
    reasons = not_plain(facts, adapters)
    touched = {*facts.targets.values(), *facts.saved_whole}
    with TensorReader(base) as before, TensorReader(merged) as after:
        stray = _stray(before, after, sorted(new.keys() - touched))
        target_checks = (
            _unrecomputed(before, after, facts, reasons)
            if reasons
            else _recompute(before, after, facts, SAFETENSORS_NAMES[dtype])
        )
    untouched = Check(
        "untouched",
        not stray,
        f"{stray[0]} is not a target of the adapter, but differs from the base"
        if stray
        else "every tensor outside the adapter's targets equals the base's",
        {"tensors": len(new.keys() - touched), "changed": len(stray)},
    )
    return [structure, untouched, *target_checks]


def not_plain(facts: AdapterFacts, adapters: int) -> list[str]:
    """Return why the merged weights are not just cast(W + scale * B @ A); empty if they are."""
    return [*facts.beyond_plain, *(["several adapters"] if adapters > 1 else [])]


def _structure(base: Path, old: Shapes, new: Shapes, dtype: str) -> Check:
    """Check names, shapes and dtypes; remove tensors without a partner from `old` and `new`."""
    tied = read_json(base / "config.json").get("tie_word_embeddings")
    if tied and ("lm_head.weight" in old) != ("lm_head.weight" in new):
        # A tied head is the embedding; transformers may or may not write it.
        old.pop("lm_head.weight", None)
        new.pop("lm_head.weight", None)
    for name in [name for name in old if name.endswith("rotary_emb.inv_freq")]:
        del old[name]  # a buffer old checkpoints carry, computed at load today
    problems = [f"{name} is missing" for name in sorted(old.keys() - new.keys())]
    problems += [f"{name} is not in the base" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        (before, shape), (after, merged_shape) = old[name], new[name]
        if shape != merged_shape:
            problems.append(f"{name} is {list(merged_shape)}, base {list(shape)}")
        floating = before in {"BF16", "F16", "F32", "F64"}
        expected = SAFETENSORS_NAMES[dtype] if floating else before
        if after != expected:
            problems.append(f"{name} is {after}, {expected} expected")
    detail = problems[0] if problems else f"{len(new)} tensors with the base's names and shapes"
    figures = {
        "tensors": len(new),
        "problems": len(problems),
        "dtype": SAFETENSORS_NAMES[dtype],
        "base_dtypes": sorted({stored for stored, _ in old.values()}),
    }
    return Check("structure", not problems, detail, figures)


def _stray(before: TensorReader, after: TensorReader, names: list[str]) -> list[str]:
    """Return the `names` whose tensor is not the base's, cast to the merged dtype."""
    import torch

    stray = []
    for name in names:
        new = after.get(name)
        old = before.get(name).to(new.dtype)
        # Compare bytes, not values: NaN equals itself, the two zeros differ.
        if not torch.equal(new.flatten().view(torch.uint8), old.flatten().view(torch.uint8)):
            stray.append(name)
    return stray


def _unrecomputed(
    before: TensorReader, after: TensorReader, facts: AdapterFacts, reasons: list[str]
) -> list[Check]:
    """For adapters beyond W + scale * B @ A: check only that the targets changed."""
    targets = sorted({*facts.targets.values(), *facts.saved_whole})
    changed = [
        name
        for name in targets
        if bool(((new := after.get(name)) != before.get(name).to(new.dtype)).any())
    ]
    why = f"not recomputed: {', '.join(reasons)}; see the logits"
    return [
        Check("recomputed", None, why, {"targets": len(targets)}),
        Check(
            "effect",
            bool(changed),
            f"{len(changed)} of {len(targets)} target tensors differ from the base",
            {"changed_tensors": len(changed)},
        ),
    ]


def _recompute(
    before: TensorReader, after: TensorReader, facts: AdapterFacts, dtype: str
) -> list[Check]:
    """Recompute each target as cast(W + scale * B @ A) in float32.

    W [out, in] is the base's tensor in the merged dtype: LLaMA-Factory (model/loader.py) and we
    cast a base of another dtype while loading it. An element may differ only where two float32
    sums of rank + 3 terms can round to different sides: |merged - exact| is at most half a unit in
    the last place of the merged dtype plus (rank + 3) 2^-22 (|W| + scale |B||A|) (Higham, Accuracy
    and Stability of Numerical Algorithms, 3.1, for both sums). No element may exceed that.
    """
    import torch

    worst, largest = 0.0, 0.0
    elements = moved = otherwise = outside = 0
    wrong: list[str] = []
    still: list[str] = []
    for _, name, a, b in lora_pairs(facts):
        bad = changed = 0
        for part in row_parts(b.shape[0]):
            got = after.rows(name, part)
            stored = before.rows(name, part).to(got.dtype)
            exact = torch.addmm(stored.float(), b[part], a, alpha=facts.scale)
            # NaN differs from everything, so it is included.
            row, column = (got != exact.to(got.dtype)).nonzero(as_tuple=True)
            if len(row):
                off = (got[row, column].float() - exact[row, column]).abs()
                product = (b[part][row].abs() * a[:, column].T.abs()).sum(-1)
                size = stored[row, column].float().abs() + abs(facts.scale) * product
                unit = ulp(exact[row, column], dtype)
                allowed = 0.5 * unit + (facts.rank + 3) * 2.0**-22 * size
                bad += int((~(off <= allowed)).sum())
                otherwise += len(row)
                worst = max(worst, float((off / unit).max()))
            changed += int((got != stored).sum())
            largest = max(largest, float((got.float() - stored.float()).abs().max()))
            elements += got.numel()
        outside += bad
        moved += changed
        wrong += [name] if bad else []
        still += [name] if not changed else []
    figures = {
        "targets": len(facts.targets),
        "elements": elements,
        "rounded_otherwise": otherwise,
        "outside": outside,
        "wrong_tensors": len(wrong),
        "max_ulp": float(f"{worst:.6g}") if otherwise else 0.5,
        "scale": facts.scale,
        "rank": facts.rank,
    }
    effect = {
        "changed_tensors": len(facts.targets) - len(still),
        "changed_elements": moved,
        "max_change": float(f"{largest:.6g}"),
        "unchanged": still[:5],
    }
    return [
        Check(
            "recomputed",
            not wrong,
            f"{wrong[0]} is not W + scale * B @ A ({outside} elements, {len(wrong)} tensors)"
            if wrong
            else f"all {elements} elements are cast(W + scale * B @ A), {otherwise} of them "
            "rounded to the other neighbour",
            figures,
        ),
        Check(
            "effect",
            moved > 0,
            f"{moved} of {elements} target elements differ from the base"
            if moved
            else "the merged model equals the base: the adapter has no effect",
            effect,
        ),
    ]


def ulp(values: Any, dtype: str) -> Any:
    """Return the distance between neighbours of `dtype` (safetensors' name) at `values`.

    `values` is float32 of any shape; so is the result, of the same shape.
    """
    import torch

    bits, smallest = _SIGNIFICAND[dtype]
    exponent = torch.frexp(values).exponent - bits
    exponent[values == 0] = smallest
    return torch.ldexp(torch.ones_like(values), exponent.clamp(min=smallest))
