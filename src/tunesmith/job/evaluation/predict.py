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


def _within(run_dir: Path, output: Path, name: str) -> bool:
    return output in (run_dir / name).parents


def run(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> dict[str, Any]:
    """Run `predict` of run.json (a flat LLaMA-Factory config) and return its metrics.

    Raises TunesmithError if LLaMA-Factory ended without writing a result.
    """
    config: Arguments = dict(request.predict or {})
    output = Path(config["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    # Each data set has a folder of its own: what others hold stays, and sealed as it was.
    seals.forget(run_dir, [name for name in seals.read(run_dir) if _within(run_dir, output, name)])

    from llamafactory.train.tuner import run_exp

    from tunesmith.job.data.cuts import CutReport

    cuts = CutReport.of(config, emit)
    run_exp(config, callbacks=[cuts])
    results = sorted(output.glob("*_results.json"))
    if not results:
        raise TunesmithError(f"{output}: no predict_results.json was written; see train.log")
    metrics: dict[str, float] = {}
    for file in results:
        metrics |= read_json(file)
    made = [path for path in output.rglob("*") if path.is_file()]
    names = [path.relative_to(run_dir).as_posix() for path in made if run_dir in path.parents]
    seals.seal(run_dir, _FOLDER, [name for name in names if name.startswith(f"{_FOLDER}/")])
    return {"output": str(output), "metrics": metrics, **cuts.record()}
