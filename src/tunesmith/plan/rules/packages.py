"""Settings that need a package, and those of them that the training environment has not."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tunesmith.plan.rules.fault import REMOVE, Fault
from tunesmith.plan.rules.settings import Settings

# report_to: what a name stands for, and the package that its callback imports (transformers
# 4.52.4, integrations/integration_utils.py).
TRACKERS = {
    "azure_ml": "azureml-core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}
# Words of report_to that are no tracker.
_NO_TRACKERS = ("none", "all")
# optim: the package of an optimizer, by how its name begins or ends.
_OPTIMIZERS = (
    (re.compile(r"^adamw_torch_(4|8)bit"), "torchao"),
    (re.compile(r"8bit|_bnb|^lion_32bit|^paged_|^ademamix|^rmsprop_bnb"), "bitsandbytes"),
    (re.compile(r"^galore_"), "galore-torch"),
    (re.compile(r"^apollo_"), "apollo-torch"),
    (re.compile(r"^adamw_apex"), "apex"),
    (re.compile(r"^adamw_anyprecision"), "torchdistx"),
    (re.compile(r"^lomo|^adalomo"), "lomo-optim"),
    (re.compile(r"^grokadamw"), "grokadamw"),
    (re.compile(r"^schedule_free_"), "schedulefree"),
)


# Why a package that people ask for is in no lock of this stack.
UNAVAILABLE = {
    "eetq": "PyPI has its sources alone, and its kernels want nvcc to be compiled",
    "flash-attn": "PyPI has its sources alone, which nvcc compiles; `auto` takes torch's own "
    "kernels, and LLaMA-Factory would silently go on with those",
    "hqq": "PyPI has its sources alone, and it is in no lock of this stack; `bitsandbytes` "
    "quantises, too",
    "mixture-of-depth": "its first step fails with transformers 4.52.4: the tokens it selects do "
    "not fit the position embeddings",
    "swanlab": "of the versions tried, 0.6.8, 0.6.12 and 0.7 need rich < 14, 0.8 and newer ones "
    "protobuf < 7; this stack has rich 15 and protobuf 7",
    "unsloth": "it replaces parts of torch, transformers and trl, and is not proven with those "
    "of this stack",
}

# How a package gets into the training environment, as a hint begins; "" where it does not.
Remedy = Callable[[str], str]


def no_remedy(_package: str) -> str:
    """Return nothing: it does not get there."""
    return ""


@dataclass(frozen=True)
class Need:
    """A package that a key with a value asks for."""

    key: str
    package: str
    # What works without the package; None: the key is to be removed.
    instead: object = None


_SWITCHES = (
    Need("use_unsloth", "unsloth"),
    Need("enable_liger_kernel", "liger-kernel"),
    Need("mixture_of_depths", "mixture-of-depth"),
    Need("use_galore", "galore-torch"),
    Need("use_apollo", "apollo-torch"),
    Need("use_badam", "badam"),
    Need("use_adam_mini", "adam-mini"),
    Need("deepspeed", "deepspeed"),
    Need("plot_loss", "matplotlib"),
    Need("use_swanlab", "swanlab"),
    Need("predict_with_generate", "rouge-chinese"),
    Need("predict_with_generate", "jieba"),
    Need("predict_with_generate", "nltk"),
)


def needs(settings: Settings) -> Iterator[Need]:
    """Yield each package that a config asks for."""
    for need in _SWITCHES:
        if settings.on(need.key):
            yield need
    if settings.get("flash_attn") == "fa2":
        yield Need("flash_attn", "flash-attn", "auto")
    bits, method = settings.get("quantization_bit"), settings.get("quantization_method")
    if bits is not None:
        package = {"hqq": "hqq", "eetq": "eetq"}.get(str(method), "bitsandbytes")
        yield Need(
            "quantization_method" if package != "bitsandbytes" else "quantization_bit", package
        )
    for pattern, package in _OPTIMIZERS:
        if pattern.search(str(settings.get("optim"))):
            yield Need("optim", package, "adamw_torch")
            break
    for name in trackers(settings):
        if name in TRACKERS:
            yield Need("report_to", TRACKERS[name], "none")


def trackers(settings: Settings) -> list[str]:
    """Return the names that `report_to` holds, without `none` and `all`."""
    return [name for name in settings.names("report_to") if name not in _NO_TRACKERS]


def faults(
    settings: Settings, installed: Collection[str], remedy: Remedy = no_remedy
) -> Iterator[Fault]:
    """Yield a fault for each package that a config needs and `installed` has not.

    `remedy` says how one gets there.
    """
    for name in trackers(settings):
        if name not in TRACKERS:
            yield Fault(
                "report_to",
                f"`report_to: {name}` is no tracker; known are {', '.join(TRACKERS)}",
                {"report_to": "none"},
            )
    for need in needs(settings):
        if need.package in installed:
            continue
        why = f": {UNAVAILABLE[need.package]}" if need.package in UNAVAILABLE else ""
        yield Fault(
            need.key,
            f"`{need.key}` needs {need.package}, which the training environment lacks{why}",
            {need.key: REMOVE if need.instead is None else need.instead},
            command=remedy(need.package),
        )
