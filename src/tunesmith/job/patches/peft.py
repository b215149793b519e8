"""peft: bitsandbytes is imported only for models that use it; names of the LoRA layer."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tunesmith.core.patching import Patch, PrivateName

_VERSIONS = "peft==0.15.*"


def bitsandbytes_is_used() -> bool:
    """Whether a module has imported it, as a model with its layers has."""
    return "bitsandbytes" in sys.modules


def _only_if_used(_available: Callable[[], bool]) -> Callable[[], bool]:
    return bitsandbytes_is_used


def _lazy(name: str) -> Patch:
    return Patch(
        target=f"peft.tuners.lora.model:{name}",
        caller="peft.tuners.lora.model:LoraModel._create_new_module",
        versions=_VERSIONS,
        why="importing bitsandbytes prepares torch's compiler: 1.6 s of the 7 s from "
        "start to first batch, for layers that only a quantised model has",
        removal="peft imports it only for a layer that is bitsandbytes' own",
        make=_only_if_used,
    )


NO_BNB = _lazy("is_bnb_available")
NO_BNB_4BIT = _lazy("is_bnb_4bit_available")

PATCHES = (NO_BNB, NO_BNB_4BIT)
PRIVATE = (
    PrivateName(
        "_cast_input_dtype", "peft.tuners.lora.layer:Linear", _VERSIONS, ("job.training.cpu_lora",)
    ),
    PrivateName(
        "cast_input_dtype_enabled",
        "peft.tuners.lora.layer:LoraLayer.__init__",
        _VERSIONS,
        ("job.training.fast_trainer",),
    ),
    # Set on each plain LoRA layer of one model.
    PrivateName("forward", "peft.tuners.lora.layer:Linear", _VERSIONS, ("job.training.cpu_lora",)),
)
