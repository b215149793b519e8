"""How much memory a training takes: weights, what is trained, and one step of it.

Pure, and without torch. What is sure is told from what is estimated: weights, gradients and an
optimizer's moments are counted; activations, logits and the library's own are fitted to measured
trainings (docs/models.md), on a processor only. A refusal rests on what is sure.

Counted as LLaMA-Factory 0.9.3 trains: what is trained is float32 (`cast_trainable_params_to_fp32`,
model/adapter.py) unless `pure_bf16`; gradient checkpointing is on unless it is disabled
(model/model_utils/checkpointing.py). Standard library, Python 3.10.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tunesmith.basemodel.architecture import EMBEDDINGS
from tunesmith.basemodel.shape import ModelShape
from tunesmith.core import formats
from tunesmith.core.documents import Config

# LLaMA-Factory's and transformers' defaults, of the keys that count.
_BATCH, _CUTOFF, _RANK, _FROZEN_BUT = 8, 2048, 8, 2
# Bytes an optimizer keeps for a number that is trained, by how its name begins or what it has in it
# (transformers 4.52.4, trainer.py, get_optimizer_cls_and_kwargs). The first that fits counts.
_MOMENTS: tuple[tuple[str, float], ...] = (
    ("8bit", 2),
    ("4bit", 1),
    ("sgd", 0),
    ("adafactor", 0),
    ("lion", 4),
    ("rmsprop", 4),
    ("adagrad", 4),
    ("adam", 8),
)
# Keys whose optimizers keep less than their name says: how much is not counted here.
_OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
# Bytes of a number in 4 bits with its scales, quantised twice: 0.5 + 1/64 (bitsandbytes, NF4).
_QUANTIZED = {4: 0.516, 8: 1.0}
# Fitted to the peaks of tests/data/memory.json. Numbers a token that a layer keeps for its backward
# pass, of `hidden` (an adapter keeps its own inputs) and of `inner`; what checkpointing keeps of a
# layer, of `hidden` (on a processor the heap has gaps); copies of the logits in float32; what an
# optimizer takes while it changes the largest tensor.
_OF_HIDDEN, _OF_HIDDEN_WITH_ADAPTER, _OF_INNER = 19.1, 29.2, 4.0
_CHECKPOINTED = {"gpu": 1.0, "cpu": 10.5}
_LOGITS = 3.0
_UPDATE = 3.6
# What the libraries themselves take: a CUDA context with cuBLAS's workspaces; a process with torch.
_LIBRARIES = {"gpu": 900_000_000, "cpu": 900_000_000}
# Of a GPU's memory, what a training may be planned to take: an allocator leaves gaps.
_USABLE = 0.95


@dataclass(frozen=True)
class Setting:
    """What of a config decides how much memory its training takes.

    `trained_layers` are those of freeze tuning, `back` the layers the backward pass goes through
    (None: all). `bits` is how wide the weights are quantised (None: they are not), `number` the
    bytes of one number of the compute type, `moments` those an optimizer keeps for one trained
    (None: nobody knows), `zero` DeepSpeed's stage, `processes` those that share what ZeRO divides.
    """

    method: str
    rank: int
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    trained_layers: int
    back: int | None
    batch: int
    cutoff: int
    checkpointing: bool
    number: int
    pure: bool
    bits: int | None
    moments: float | None
    reference: bool
    zero: int = 0
    processes: int = 1


@dataclass(frozen=True)
class Part:
    """Bytes of one thing; `sure` where they are counted, not estimated.

    `when`: a step holds activations and logits first, gradients and the optimizer's update last.
    """

    what: str
    size: int
    sure: bool
    when: Literal["always", "first", "last"] = "always"


@dataclass(frozen=True)
class Estimate:
    """What a training takes on a `device`, gpu or cpu, of each process.

    `measured`: trainings of this kind were measured, and the estimate was within 10 %.
    """

    parts: tuple[Part, ...]
    device: str
    measured: bool

    @property
    def total(self) -> int:
        """The most it takes at one time, estimates too."""
        at = dict.fromkeys(("always", "first", "last"), 0)
        for part in self.parts:
            at[part.when] += part.size
        return at["always"] + max(at["first"], at["last"])

    @property
    def sure(self) -> int:
        """What it takes at the least."""
        return sum(part.size for part in self.parts if part.sure)

    def render(self) -> list[str]:
        """Return it as lines, the total last."""
        mark = "" if self.measured else " (estimate)"
        lines = [
            f"{formats.size(part.size):>9}  {part.what}{'' if part.sure else mark}"
            for part in self.parts
        ]
        return [*lines, f"{formats.size(self.total):>9}  at the peak of a step{mark}"]


def setting_of(values: Config, *, on_gpu: bool, zero: int = 0, processes: int = 1) -> Setting:
    """Return what counts of a checked config.

    `zero` is the stage of the DeepSpeed config it names. On a processor numbers are float32: the
    job runner turns bf16 off there.
    """
    method = str(values.get("finetuning_type", "lora"))
    bits = values.get("quantization_bit")
    kept = int(values.get("freeze_trainable_layers", _FROZEN_BUT))
    stage = str(values.get("stage", "sft"))
    return Setting(
        method=method,
        rank=int(values.get("lora_rank") or _RANK),
        targets=_names(values.get("lora_target", "all")),
        whole=tuple(sorted(EMBEDDINGS & set(_names(values.get("additional_target"))))),
        trained_layers=abs(kept),
        # Layers below the first that is trained keep nothing; a negative number trains the first.
        back=kept if method == "freeze" and kept > 0 else None,
        batch=int(values.get("per_device_train_batch_size") or _BATCH),
        cutoff=int(values.get("cutoff_len") or _CUTOFF),
        checkpointing=not values.get("disable_gradient_checkpointing"),
        number=2 if on_gpu else 4,
        pure=bool(values.get("pure_bf16")) and on_gpu,
        bits=int(bits) if bits else None,
        moments=_moments(values),
        # Of a full DPO, KTO or PPO the model before the training is held beside it.
        reference=stage in ("dpo", "kto", "ppo") and method != "lora" and _compares(values),
        zero=zero,
        processes=max(1, processes),
    )


def estimate(shape: ModelShape, setting: Setting, *, on_gpu: bool) -> Estimate:
    """Return the memory that a training takes of one GPU, or of a processor's machine."""
    trained = _trained(shape, setting)
    share = setting.processes
    own = setting.number if setting.pure else 4
    frozen = shape.parameters if setting.method == "lora" else shape.parameters - trained
    weights = _weights(shape, setting, frozen)
    held = trained * own
    if setting.reference:
        weights += shape.parameters * setting.number
    if setting.zero == 3:
        weights, held = weights // share, held // share
    moments = setting.moments
    kept = trained * (4 if moments is None else moments) * own // 4
    # float32 weights are cast for each product; autocast holds the copies for a step.
    casts = 0 if setting.method == "lora" or setting.number == own else trained * setting.number
    gradients = trained * own // (share if setting.zero >= 2 else 1)
    optimizer = int(kept) // (share if setting.zero >= 1 else 1)
    tokens = setting.batch * setting.cutoff
    device = "gpu" if on_gpu else "cpu"
    counted = moments is not None
    logits = int(tokens * shape.vocabulary * 4 * _LOGITS)
    update = 0 if setting.method == "lora" else int(shape.embedding * own * _UPDATE)
    parts = (
        Part(_weights_words(setting), weights, True),
        Part(f"what is trained ({_count(trained)})", held, counted or setting.method != "freeze"),
        Part("the optimizer", optimizer, counted),
        Part("casts of the weights", casts, False),
        Part("the libraries", _LIBRARIES[device], False),
        Part(f"activations of {tokens} tokens", _kept(shape, setting, device), False, "first"),
        Part("logits", logits, False, "first"),
        Part("gradients", gradients, counted, "last"),
        Part("the update", update, False, "last"),
    )
    plain = counted and not setting.reference and setting.bits is None and shape.experts == 1
    return Estimate(tuple(p for p in parts if p.size), device, plain and not on_gpu)


@dataclass(frozen=True)
class Change:
    """Keys of a config with which it takes `total` bytes."""

    keys: Mapping[str, object]
    total: int

    @property
    def text(self) -> str:
        """The keys as they stand on a command line, and what they bring."""
        words = " ".join(f"{key}={_word(value)}" for key, value in self.keys.items())
        return f"`{words}` it takes about {formats.size(self.total)}"


def that_fits(
    shape: ModelShape, values: Config, room: int, *, on_gpu: bool, zero: int = 0, processes: int = 1
) -> Change | None:
    """Return the smallest change of a config with which it takes at most `room` bytes of each
    device, estimates included; None where none does."""
    small: dict[str, object] = {"per_device_train_batch_size": 1}
    if values.get("disable_gradient_checkpointing"):
        small["disable_gradient_checkpointing"] = False
    ladder: list[dict[str, object]] = [small]
    if values.get("finetuning_type", "lora") != "lora":
        ladder.append({"finetuning_type": "lora"})
        ladder.append({"finetuning_type": "lora", **small})
    if on_gpu and not values.get("quantization_bit"):
        ladder += [{"finetuning_type": "lora", "quantization_bit": 4}]
        ladder += [{"finetuning_type": "lora", "quantization_bit": 4, **small}]
    for keys in ladder:
        changed = {key: value for key, value in keys.items() if values.get(key) != value}
        setting = setting_of({**values, **changed}, on_gpu=on_gpu, zero=zero, processes=processes)
        total = estimate(shape, setting, on_gpu=on_gpu).total
        if changed and total <= room * _USABLE:
            return Change(changed, total)
    return None


def _trained(shape: ModelShape, setting: Setting) -> int:
    """Return how many numbers are trained."""
    if setting.method == "full":
        return shape.parameters - shape.apart
    if setting.method == "freeze":
        return min(shape.layers, setting.trained_layers) * shape.layer
    every = setting.targets in (("all",), ())

    def ranks(matrices: Mapping[str, tuple[int, int]]) -> int:
        chosen = [m for name, m in matrices.items() if every or name in setting.targets]
        return sum(setting.rank * (inner + outer) for inner, outer in chosen)

    layer = ranks(shape.attention) + shape.experts * ranks(shape.mlp)
    # Trained beside the adapter: embedding and head, each as large as the vocabulary.
    return shape.layers * layer + len(setting.whole) * shape.embedding


def _weights(shape: ModelShape, setting: Setting, frozen: int) -> int:
    if setting.bits is None:
        return frozen * setting.number
    small = min(frozen, shape.linear)
    return (
        int(small * _QUANTIZED.get(setting.bits, setting.bits / 8))
        + (frozen - small) * setting.number
    )


def _kept(shape: ModelShape, setting: Setting, device: str) -> int:
    """Return the bytes kept for the backward pass; with checkpointing all of one layer, and what
    goes into each."""
    adapter = setting.method == "lora"
    of_hidden = _OF_HIDDEN_WITH_ADAPTER if adapter else _OF_HIDDEN
    inner = shape.inner * min(shape.experts, 8)
    each = setting.batch * setting.cutoff * setting.number
    layer = each * (of_hidden * shape.hidden + _OF_INNER * inner)
    layers = shape.layers if setting.back is None else min(setting.back, shape.layers)
    if setting.checkpointing:
        return int(layer + each * layers * shape.hidden * _CHECKPOINTED[device])
    return int(layer * layers)


def _moments(values: Config) -> float | None:
    if any(values.get(key) for key in _OTHER_OPTIMIZERS):
        return None
    if _names(values.get("freeze_trainable_modules", "all")) != ("all",):
        return None  # a part of each layer: how much is trained is not counted here
    name = str(values.get("optim") or "adamw_torch")
    return next((size for word, size in _MOMENTS if word in name), None)


def _compares(values: Config) -> bool:
    return values.get("pref_loss") not in ("orpo", "simpo")


def _names(value: object) -> tuple[str, ...]:
    words = value if isinstance(value, list) else str(value or "").split(",")
    return tuple(word for item in words if (word := str(item).strip()))


def _weights_words(setting: Setting) -> str:
    if setting.bits:
        return f"weights in {setting.bits} bits"
    return "weights that stay as they are" if setting.method != "full" else "weights"


def _count(numbers: int) -> str:
    return f"{numbers / 1e9:.2f} billion" if numbers >= 1e9 else f"{numbers / 1e6:.1f} million"


def _word(value: object) -> str:
    return (
        {True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool)
        else (str(value))
    )
