"""Steps, time and cost of a training, estimated before a GPU is rented."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from tunesmith.core.documents import Config, JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.dataset import mix


@dataclass(frozen=True)
class Gpu:
    """One line of configs/gpus.yml, with the ranges that hold for all.

    `tflops`: 10^12 operations a second; `utilisation`: shares of it; `launch_seconds`: a
    layer's least time in one micro-step.
    """

    name: str
    tflops: float
    memory_gb: float
    utilisation: tuple[float, float]
    launch_seconds: tuple[float, float]


@dataclass(frozen=True)
class Model:
    """What of a model decides the work: parameters in matrix products, layers."""

    parameters: int
    layers: int


@dataclass(frozen=True)
class Estimate:
    """Optimiser steps, and the least and most seconds (and money) they may take."""

    steps: int
    seconds: tuple[float, float]
    cost: tuple[float, float] | None


def load_gpu(path: Path, name: str) -> Gpu:
    """Return a GPU by its name, letter case and blanks aside. Raises UsageError when unknown."""
    table = yaml.safe_load(path.read_text(encoding="utf-8"))

    def plain(text: str) -> str:
        return "".join(letter for letter in text.casefold() if letter.isalnum())

    for known, values in table["gpus"].items():
        if plain(known) == plain(name):
            low, high = table["launch_ms"]
            least, most = table["utilisation"]
            launch = (low / 1000, high / 1000)
            return Gpu(known, values["tflops"], values["memory_gb"], (least, most), launch)
    raise UsageError(f"--gpu {name} is unknown; known are {', '.join(table['gpus'])} ({path})")


def model_of(config: Config, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Model:
    """Return the size of a model from its config.json and its tensors' shapes.

    An embedding is looked up, not multiplied; where it also serves as the output layer
    (no lm_head of its own) it counts.
    """
    head = any(name.startswith("lm_head.") for name in shapes)
    total = sum(
        math.prod(shape)
        for name, (_, shape) in shapes.items()
        if len(shape) == 2 and not (head and "embed_tokens" in name)
    )
    return Model(total, int(config.get("num_hidden_layers") or 24))


def steps_of(replayed: JsonObject, gpus: int = 1) -> int:
    """Return the optimiser steps, as transformers' Trainer counts them."""
    if replayed["max_steps"] > 0:
        return int(replayed["max_steps"])
    return mix.steps_of(
        int(replayed["sequences"]),
        int(replayed["batch_size"]) * gpus,
        int(replayed["accumulation"]),
        float(replayed["epochs"]),
        drop_last=bool(replayed["drop_last"]),
    )


def estimate(
    replayed: JsonObject,
    model: Model,
    config: Config,
    gpu: Gpu,
    price: float | None,
) -> Estimate:
    """Return steps, time and cost on one GPU.

    Operations a token: 2N forward and 2N back through frozen weights, 2N more for weights
    that are trained, 2N more when checkpointing computes the forward pass twice. A micro-step
    takes no less than the launches of its kernels. `price` is per hour, in any currency.
    """
    steps = steps_of(replayed)
    micro_steps = steps * replayed["accumulation"]
    an_epoch = max(math.ceil(replayed["sequences"] / replayed["batch_size"]), 1)
    tokens = replayed["padded_tokens_an_epoch"] * micro_steps / an_epoch
    passes = 4 if config.get("finetuning_type", "lora") == "lora" else 6
    if not config.get("disable_gradient_checkpointing"):
        passes += 2
    operations = tokens * passes * model.parameters
    seconds = [
        max(operations / (gpu.tflops * 1e12 * share), micro_steps * model.layers * launch)
        for share, launch in zip(reversed(gpu.utilisation), gpu.launch_seconds, strict=True)
    ]
    cost = None
    if price is not None:
        cost = (seconds[0] / 3600 * price, seconds[1] / 3600 * price)
    return Estimate(steps, (seconds[0], seconds[1]), cost)


def price_of(text: str) -> float | None:
    """Return the number of `1.98/h` or `1.98`, None for "". Raises UsageError for another text."""
    if not text:
        return None
    try:
        value = float(text.removesuffix("/h").strip())
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(
            f"--price {text!r} is not an hourly price", hint="write it as in --price 1.98/h"
        )
    return value
