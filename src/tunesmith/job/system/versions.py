"""Facts of the training environment: `python -m tunesmith.job.system.versions` prints them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import tunesmith

_PACKAGES = (
    "llamafactory",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "tokenizers",
    "safetensors",
    "liger-kernel",
    "bitsandbytes",
)


def versions() -> dict[str, Any]:
    """Return the versions a result depends on. Imports torch to name the device."""
    import torch

    found: dict[str, Any] = {
        "tunesmith": tunesmith.__version__,
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    cuda = torch.cuda.is_available()
    return found | {
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name(0) if cuda else f"CPU ({platform.machine()})",
        "devices": torch.cuda.device_count() if cuda else 0,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "environment": sys.prefix,
        "lock": os.environ.get("TUNESMITH_LOCK"),
        "lock_sha256": os.environ.get("TUNESMITH_LOCK_SHA256"),
    }


if __name__ == "__main__":
    print(json.dumps(versions()))
