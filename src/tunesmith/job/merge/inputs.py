"""The inputs of a merge: adapter, base model and options of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel import merging
from tunesmith.basemodel.files import require, tensor_shapes
from tunesmith.core.documents import Arguments, Config
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json
from tunesmith.job.merge import streaming
from tunesmith.job.merge.adapter import AdapterFacts, check_fits
from tunesmith.job.run import config as run_config
from tunesmith.job.run.schema import RunRequest

# Bytes per element of each dtype, and its names in safetensors and PyTorch.
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
SAFETENSORS_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ACCEPT = "accept_mismatch"  # in run.json's `merge`: export although prompts differ
_OURS = ("model_name_or_path", "adapter_name_or_path", "export_dir", "finetuning_type", ACCEPT)


@dataclass(frozen=True)
class MergeInputs:
    """A run's adapter and the base model it fits; `keys` are LLaMA-Factory's export keys."""

    config: Config
    base: Path
    adapters: list[str]
    facts: AdapterFacts
    keys: Config

    def why_whole(self) -> str | None:
        """Return why the merge needs the whole model in memory; None if it works block by block."""
        return streaming.why_not(self.facts, self.adapters, self.keys, self.config, self.base)


def read(run_dir: Path, request: RunRequest) -> MergeInputs:
    """Return the inputs of a run's merge. Raises UsageError if the run cannot be merged.

    That is the case for full or freeze tuning, a quantised or damaged base, an adapter of another
    base, and export keys whose result no proof can read.
    """
    config = run_config.read_config(run_dir)
    base = Path(config["model_name_or_path"])
    check_mergeable(config, base)
    require(base, request.model.name if request.model else None)
    adapters = run_config.tuned_adapters(config, Path(config["output_dir"]))
    facts = [check_fits(base, Path(folder)) for folder in adapters][-1]
    return MergeInputs(config, base, adapters, facts, export_keys(request.merge or {}, base))


def requires_full_merge(run_dir: Path, reason: str) -> UsageError:
    """Return the error for a block-by-block merge that needs the whole model in memory."""
    return UsageError(
        f"run {run_dir.name} can be merged only with the whole model in memory ({reason}): "
        f"`inv merge --on HOST --run {run_dir.name}` does it on the host, then "
        f"`inv pull --on HOST --run {run_dir.name} --what merged` downloads it"
    )


def check_mergeable(config: Config, base: Path) -> None:
    """Raise UsageError, with the alternative, if this run's result cannot be merged."""
    if fault := merging.by_settings(config):
        raise UsageError(fault.text, hint=fault.hint)
    if not (base / "config.json").is_file():
        raise UsageError(f"{base / 'config.json'}: missing: fetch the base model again")
    if fault := merging.by_model(config, read_json(base / "config.json")):
        raise UsageError(f"{base}: {fault.text}", hint=fault.hint)


def export_keys(options: Config, base: Path) -> Arguments:
    """Return LLaMA-Factory's export keys: the options, with dtype and device made explicit.

    infer_dtype `auto` becomes the dtype of the base's weights: 0.9.3 writes float32, twice the
    size, for `auto` on a machine without a GPU.
    """
    keys = {key: value for key, value in options.items() if key not in _OURS}
    if keys.get("export_legacy_format"):
        raise UsageError(
            "export_legacy_format: true writes pickles, which no proof reads: set false"
        )
    if keys.get("export_hub_model_id"):
        raise UsageError(
            "export_hub_model_id: uploads before the proof: upload RUN/merged after it"
        )
    keys.setdefault("export_size", 5)
    keys.setdefault("export_device", "cpu")
    dtype = keys.setdefault("infer_dtype", "bfloat16")
    if dtype == "auto":
        stored, _ = max(tensor_shapes(base).values(), key=lambda entry: math.prod(entry[1]))
        names = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
        keys["infer_dtype"] = names.get(stored, "bfloat16")
    elif dtype not in SIZES:
        raise UsageError(f"infer_dtype: {dtype!r}, one of {', '.join(SIZES)} or auto expected")
    return keys
