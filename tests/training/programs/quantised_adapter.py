"""Print of which kind the adapters of a plain and of a 4-bit layer are, after a trimmed start.

In a process of its own, since what is trimmed is what a process imports.
"""

from __future__ import annotations

import sys

from tunesmith.job.patches import imports

imports.trim()

import bitsandbytes  # noqa: E402  as transformers does when it loads a quantised model
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402


class Model(torch.nn.Module):  # type: ignore[misc]
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.nn.Linear(8, 8)
        self.four = bitsandbytes.nn.Linear4bit(8, 8)


model = Model()
model.is_loaded_in_4bit = True  # as transformers says it
config = LoraConfig(target_modules=["plain", "four"])
adapted = get_peft_model(model, config).base_model.model
print(type(adapted.plain).__module__, type(adapted.four).__module__)
print(type(adapted.four).__name__, "sklearn" in sys.modules)
