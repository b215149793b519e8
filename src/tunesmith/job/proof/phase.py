"""Proof that RUN/merged is base model + adapter, from the files alone, in a new process.

Weights (proof/weights.py): recomputed tensor by tensor. Behaviour (proof/behaviour.py): the merged
model in plain transformers compared with base and unmerged adapter in PEFT. Prompts
(prompts/parity.py): every path to the model produces the training prompt. A model that fails is
renamed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunesmith.basemodel.files import verify
from tunesmith.core.documents import Config
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Codec
from tunesmith.job.merge import manifest
from tunesmith.job.merge.adapter import check_fits
from tunesmith.job.merge.inputs import export_keys
from tunesmith.job.prompts import parity
from tunesmith.job.prompts.records import ParityRecord
from tunesmith.job.proof.behaviour import (
    NEW_TOKENS,
    Tolerance,
    behaviour_checks,
    questions,
    tokenizer_check,
)
from tunesmith.job.proof.weights import Check, file_check, weight_checks
from tunesmith.job.run import config as run_config
from tunesmith.job.run import seals
from tunesmith.job.run.folder import MERGED, REFUSED
from tunesmith.job.run.schema import RunRequest


def run(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> dict[str, Any]:
    """Prove RUN/merged and write RUN/proof.json.

    Raises TunesmithError with the first failed check; the merged model is then renamed to
    RUN/merged.refused. Raises UsageError if there is nothing to prove.
    """
    started = time.monotonic()
    config = run_config.read_config(run_dir)
    merged = run_dir / MERGED
    if not merged.is_dir():
        raise UsageError(
            f"{merged}: no merged model", hint=f"`inv merge --run {run_dir.name}` makes it"
        )
    base, output = Path(config["model_name_or_path"]), Path(config["output_dir"])
    adapters = run_config.tuned_adapters(config, output)
    facts = check_fits(base, Path(adapters[-1]))
    dtype = str(export_keys(request.merge or {}, base)["infer_dtype"])

    def step(done: int) -> None:
        emit("progress", phase="proof", done=done, total=3, unit="steps")

    step(0)
    complete, files = file_check(merged)
    checks = [complete]
    tolerance: Tolerance | None = None
    # If a file was changed after the merge, the other checks still show how.
    comparable = not verify(merged)
    if comparable:
        checks += weight_checks(base, merged, facts, dtype, len(adapters))
    step(1)
    # A model with different tensors cannot be loaded for comparison.
    if comparable and all(check.passed for check in checks if check.name == "structure"):
        probes = questions(request, run_dir)
        codec = engine.codec(engine.arguments(config))
        checks.append(tokenizer_check(base, merged, probes))
        checks.append(parity_check(run_dir, config, codec, merged))
        longest = min(NEW_TOKENS, request.evaluate.max_new_tokens)
        behaviour, tolerance = behaviour_checks(
            base, adapters, merged, facts, codec, probes, dtype, longest
        )
        checks += behaviour
    step(3)
    failed = [check for check in checks if check.passed is False]
    proof = {
        "passed": not failed,
        "seconds": round(time.monotonic() - started, 1),
        "tolerance": asdict(tolerance) if tolerance else {},
        "base": str(base),
        "adapters": adapters,
        "checks": [check.record() for check in checks],
        "files": {name: asdict(record) for name, record in files.items()},
    }
    if failed:
        seals.forget(run_dir, (MERGED,))
        _refuse(merged)
    else:
        _note(run_dir, merged, checks, files)
    with seals.rewriting(run_dir, "proof", "proof.json"):
        write_json(run_dir / "proof.json", proof)
    if failed:
        raise TunesmithError(
            f"merged model refused: {failed[0].name}: {failed[0].detail}; it is now in "
            f"{run_dir / REFUSED}: `inv merge --run {run_dir.name}` merges again",
            [f"{check.name}: {check.detail}" for check in failed[1:]],
        )
    skipped = [check.name for check in checks if check.passed is None]
    return {"passed": True, "checks": len(checks), "skipped": skipped, "seconds": proof["seconds"]}


def _note(run_dir: Path, merged: Path, checks: list[Check], files: manifest.Files) -> None:
    """Write the passed checks to the manifest, and seal the model as proven."""
    seals.forget(run_dir, (MERGED,))
    manifest.note(merged, "proof", {check.name: check.passed for check in checks})
    hashes = {f"{MERGED}/{name}": asdict(record) for name, record in files.items()}
    seals.seal(run_dir, "proof", (MERGED,), hashes)


def _refuse(merged: Path) -> None:
    refused = merged.parent / REFUSED
    if refused.exists():
        shutil.rmtree(refused)
    merged.rename(refused)


def parity_check(run_dir: Path, config: Config, codec: Codec, merged: Path) -> Check:
    """Check that every path to the merged model still produces the training prompt.

    A difference the user accepted at the merge (parity.json) neither fails nor passes here.
    """
    verdict = parity.check(config, codec, merged)
    figures = {"probes": verdict.probes, "rows": verdict.rows, "ids": verdict.ids}
    file = run_dir / "parity.json"
    record: ParityRecord = read_json(file) if file.is_file() else {}
    faults = verdict.faults()
    if not verdict.probes:
        return Check("parity", None, verdict.notes[0], figures)
    if faults and record.get("accepted") and faults == parity.faults_of(record):
        return Check("parity", None, f"accepted at the merge: {faults[0]}", figures)
    detail = (
        faults[0]
        if faults
        else f"training, chat, API, chat template and Modelfile agree in {verdict.ids} ids of "
        f"{verdict.probes} prompts; answers end with {verdict.stop!r}"
    )
    return Check("parity", not faults, detail, figures)
