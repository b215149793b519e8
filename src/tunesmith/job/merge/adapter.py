"""The content of a LoRA adapter folder, and whether the adapter fits a base model.

No torch: JSON and safetensors headers are enough and take milliseconds, before any weight is
read. Tensor names are those of PEFT 0.15.2: `base_model.model.<module>.lora_A.weight`,
shape [rank, in_features], and `lora_B.weight`, shape [out_features, rank].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel.files import Shapes, pickles, tensor_shapes
from tunesmith.core.documents import ModelConfig
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json
from tunesmith.job.run.adapters import ADAPTER_CONFIG, refuse_code

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Further weights that transformers' trainer may save.
_TRAINER_STATE = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?$")

# adapter_config keys beyond plain LoRA on linear layers: merged correctly by PEFT, but not
# the formula W + scale * B @ A, so a proof cannot recompute them tensor by tensor.
_BEYOND_PLAIN = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
)


Misfit = Callable[[str], UsageError]  # makes the error for a reason


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's adapter_config.json that define an adapter's effect on its base."""

    base_named: str | None
    rank: int
    alpha: float
    rslora: bool
    transposed: bool  # fan_in_fan_out: weights of the base have shape [in, out]
    target_modules: tuple[str, ...] | None  # None: a pattern, or not every module with the name
    beyond_plain: tuple[str, ...]

    @classmethod
    def of(cls, stored: ModelConfig) -> AdapterConfig:
        """Read PEFT 0.15.2's keys."""
        targets = stored.get("target_modules")
        restricted = stored.get("layers_to_transform") or stored.get("exclude_modules")
        return cls(
            base_named=stored.get("base_model_name_or_path"),
            rank=int(stored["r"]),
            alpha=float(stored["lora_alpha"]),
            rslora=bool(stored.get("use_rslora")),
            transposed=bool(stored.get("fan_in_fan_out")),
            target_modules=tuple(targets) if isinstance(targets, list) and not restricted else None,
            beyond_plain=tuple(_features(stored)),
        )


@dataclass(frozen=True)
class AdapterFacts:
    """A LoRA adapter that fits the base model it was checked against."""

    folder: Path
    base_named: str | None  # the base model in the adapter's config
    rank: int
    alpha: float
    rslora: bool
    targets: Mapping[str, str]  # adapter module -> name of the base tensor it changes
    saved_whole: tuple[str, ...]  # modules_to_save: base tensors the adapter replaces
    beyond_plain: tuple[str, ...]  # features that W + scale * B @ A does not cover
    parameters: int

    @property
    def scale(self) -> float:
        """The factor of B @ A: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))


def read_adapter(folder: Path) -> tuple[AdapterConfig, Shapes]:
    """Return the adapter's config and tensor shapes. Raises UsageError if it is incomplete."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such adapter folder")
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        names = pickles(path.name for path in folder.iterdir())
        pickled = [name for name in names if not name.startswith(_TRAINER_STATE)]
        if pickled:
            raise UsageError(
                f"{folder}: contains only pickled weights ({', '.join(pickled)}), which can run "
                f"code when loaded: save the adapter as {ADAPTER_WEIGHTS}"
            )
        raise UsageError(f"{weights}: missing: the run has not finished or the copy is incomplete")
    config_file = folder / ADAPTER_CONFIG
    try:
        config = read_json(config_file)
    except FileNotFoundError:
        raise UsageError(f"{config_file}: missing: copy the adapter folder again") from None
    except ValueError as error:
        raise UsageError(f"{config_file}: not JSON ({error}): copy the folder again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UsageError(f"{config_file}: peft_type is {kind!r}, 'LORA' expected")
    refuse_code(folder)
    # Reward runs also save a value_head.safetensors, which is not part of the adapter.
    shapes = tensor_shapes(folder)
    tensors = {name: shape for name, shape in shapes.items() if name.startswith(_PREFIX)}
    if not tensors:
        raise UsageError(f"{weights}: contains no tensors: train again or copy the file again")
    return AdapterConfig.of(config), tensors


def check_fits(base_folder: Path, adapter_folder: Path) -> AdapterFacts:
    """Return the adapter's facts if it was made for a model shaped like `base_folder`.

    Three comparisons: every lora_A/lora_B pair with the base tensor it changes; the modules that
    the adapter's target list selects in the base (a base with more layers has modules without
    adapter weights); and the base's config with that of the base in the adapter's config, if that
    folder still exists. Raises UsageError with the first mismatch, the base the adapter was
    trained on, and the given one. A base with the same shapes but different weights cannot be
    distinguished by headers.
    """
    config, tensors = read_adapter(adapter_folder)
    base = tensor_shapes(base_folder)
    config_file = base_folder / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{config_file}: missing: fetch the base model again")
    base_config = read_json(config_file)
    named = config.base_named

    def misfit(reason: str) -> UsageError:
        return UsageError(
            f"adapter {adapter_folder} does not fit base model {base_folder}: {reason}; "
            f"the adapter was trained on {named or 'an unknown model'}: "
            "use that base model as model_name_or_path"
        )

    find = _Finder(base, tied=bool(base_config.get("tie_word_embeddings")))
    targets, replaced, unusual = _match(tensors, find, config.transposed, misfit)
    _check_coverage(config.target_modules, base, targets, misfit)
    if named:
        _compare_configs(Path(named), base_config, misfit)
    return AdapterFacts(
        folder=adapter_folder,
        base_named=named,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        targets=targets,
        saved_whole=replaced,
        beyond_plain=(*config.beyond_plain, *unusual),
        parameters=sum(math.prod(shape) for _, shape in tensors.values()),
    )


def check_start(base_folder: Path, adapters: Iterable[Path]) -> None:
    """Check that adapters fit the base model that a training puts them on, as `check_fits` does.

    Not compared: a quantised base, or one in pickles, whose tensors have other names or none.
    """
    config = base_folder / "config.json"
    if not tensor_shapes(base_folder) or read_json(config).get("quantization_config"):
        return
    for folder in adapters:
        check_fits(base_folder, folder)


class _Finder:
    """Finds the base tensor of a module, for both name forms that a checkpoint may have."""

    def __init__(self, base: Shapes, tied: bool) -> None:
        self.base = base
        self.tied = tied
        # transformers 4.52 renames modules of composite models in memory (model.layers ->
        # model.language_model.layers) but not on disk; this form is the same for both.
        self.plain: dict[str, str] = {}
        for name in base:
            self.plain.setdefault(self._plain(name), name)

    @staticmethod
    def _plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in {"model", "language_model"})

    def __call__(self, module: str) -> str | None:
        name = f"{module}.weight"
        if name in self.base:
            return name
        if self.tied and module.split(".")[-1] == "lm_head":
            return next((n for n in self.base if n.endswith("embed_tokens.weight")), None)
        return self.plain.get(self._plain(name))


def _match(
    tensors: Shapes, find: _Finder, transposed: bool, misfit: Misfit
) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Return (module -> base tensor, replaced tensors, non-plain features); raise on a misfit."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    replaced: list[str] = []
    unusual: set[str] = set()
    for name, (_, shape) in sorted(tensors.items()):
        stripped = name.removeprefix(_PREFIX)
        matched = _LORA.match(stripped)
        if matched:
            pairs.setdefault(matched["module"], {})[matched["side"]] = shape
            if matched["embedding"]:
                unusual.add("LoRA on an embedding")
            elif len(shape) != 2:
                unusual.add("LoRA on a convolution")
        elif ".lora_" in stripped:
            continue  # magnitudes and biases: reported through use_dora and lora_bias
        elif find(stripped.removesuffix(".weight")) is None and stripped not in find.base:
            raise misfit(f"tensor {stripped} {list(shape)} has no counterpart in the base")
        else:
            replaced.append(find(stripped.removesuffix(".weight")) or stripped)
    targets: dict[str, str] = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            present = "lora_A" if "A" in pair else "lora_B"
            raise misfit(f"module {module} has {present} only")
        weight = find(module)
        if weight is None:
            raise misfit(f"module {module} does not exist in the base")
        if weight != f"{module}.weight" and module.split(".")[-1] == "lm_head":
            unusual.add("LoRA on a head tied to the embedding")
        inner, outer = pair["A"], pair["B"]
        shape = find.base[weight][1]
        embedding = "LoRA on an embedding" in unusual and module.endswith(("embed_tokens", "wte"))
        given = (shape[1], shape[0]) if transposed or embedding else (shape[0], shape[1])
        if inner[0] != outer[1]:
            raise misfit(
                f"{module}.lora_A {list(inner)} and lora_B {list(outer)} differ in their rank"
            )
        if (outer[0], inner[1]) != given:
            side = "lora_A" if inner[1] != given[1] else "lora_B"
            shown = inner if side == "lora_A" else outer
            raise misfit(f"{module}.{side} is {list(shown)}, base tensor {weight} {list(shape)}")
        targets[module] = weight
    if not targets:
        raise misfit("it contains no lora_A/lora_B pair")
    return targets, tuple(replaced), sorted(unusual)


def _check_coverage(
    selected: tuple[str, ...] | None,
    base: Shapes,
    targets: Mapping[str, str],
    misfit: Misfit,
) -> None:
    """Raise if the adapter's target list selects a base module for which it has no weights.

    PEFT matches a list entry to every module whose dotted name ends with it
    (tuners_utils.check_target_module_exists), so each one must have a pair.
    """
    if selected is None:
        return
    changed = set(targets.values())
    for name, (_, shape) in base.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2 or name in changed:
            continue
        if any(module == entry or module.endswith(f".{entry}") for entry in selected):
            raise misfit(f"base tensor {name} {list(shape)} has no adapter weights")


def _compare_configs(named: Path, given: ModelConfig, misfit: Misfit) -> None:
    """Compare with the config of the base in the adapter's config, if that folder exists."""
    recorded_file = named / "config.json"
    if not recorded_file.is_file():
        return
    recorded = read_json(recorded_file)
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        if recorded.get(key) != given.get(key):
            raise misfit(
                f"{key} is {given.get(key)!r}, the adapter's base has {recorded.get(key)!r}"
            )


def _features(config: ModelConfig) -> list[str]:
    """Return the adapter_config keys that go beyond W + scale * B @ A."""
    features = [key for key in _BEYOND_PLAIN if config.get(key)]
    if config.get("bias", "none") != "none":
        features.append(f"bias={config['bias']}")
    start = config.get("init_lora_weights", True)
    # PiSSA, OLoRA and LoftQ also change the base weights at initialisation.
    if isinstance(start, str) and start != "gaussian":
        features.append(f"init_lora_weights={start}")
    return features
