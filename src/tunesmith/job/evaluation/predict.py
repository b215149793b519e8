"""The predict phase: LLaMA-Factory's do_predict or do_eval with a separate config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.core.documents import Arguments
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import read_json
from tunesmith.job.run import seals
from tunesmith.job.run.schema import RunRequest

_FOLDER = "predict"


def run(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> dict[str, Any]:
    """Run `predict` of run.json (a flat LLaMA-Factory config) and return its metrics.

    Raises TunesmithError if LLaMA-Factory ended without writing a result.
    """
    config: Arguments = dict(request.predict or {})
    output = Path(config["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    seals.forget(run_dir, (_FOLDER,))

    from llamafactory.train.tuner import run_exp

    run_exp(config)
    results = sorted(output.glob("*_results.json"))
    if not results:
        raise TunesmithError(f"{output}: no predict_results.json was written; see train.log")
    metrics: dict[str, float] = {}
    for file in results:
        metrics |= read_json(file)
    seals.seal(run_dir, _FOLDER, (_FOLDER,))
    return {"output": str(output), "metrics": metrics}
