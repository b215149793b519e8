"""Skip imports of LLaMA-Factory that a job does not need.

Each job waits for its imports before its first batch. Measured on two cores with the modules of
the lock, of 7 s from start to first batch: bitsandbytes 1.6 s (it prepares torch's compiler),
scikit-learn 0.5 s, the trainers of other stages 0.4 s, text metrics 0.2 s. Nothing here changes
what is computed: only code that the job never calls is skipped.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

from tunesmith.core.patching import install, installed
from tunesmith.job.patches.peft import NO_BNB, NO_BNB_4BIT
from tunesmith.job.patches.transformers import NO_JIEBA, NO_NLTK, NO_SKLEARN

# Names of files that LLaMA-Factory's constants take from peft.utils.
PEFT_NAMES = {
    "SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "WEIGHTS_NAME": "adapter_model.bin",
}
# The packages below llamafactory.train; `tuner` imports `run_<stage>` from each.
STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")


def trim() -> None:
    """Limit the imports of other libraries; call it before importing LLaMA-Factory."""
    for patch in (NO_SKLEARN, NO_BNB, NO_BNB_4BIT):
        install(patch)


@contextlib.contextmanager
def only(stage: str, *, scores: bool) -> Iterator[None]:
    """Import only the trainer of one stage while LLaMA-Factory's tuner is imported.

    `scores`: whether ROUGE and BLEU of generated text will be needed.
    """
    others = [f"llamafactory.train.{name}" for name in STAGES if name != stage]
    absent = [name for name in others if name not in sys.modules]
    for name in absent:
        module = ModuleType(name)
        setattr(module, f"run_{name.rpartition('.')[2]}", None)
        sys.modules[name] = module
    try:
        with contextlib.ExitStack() as stack:
            for patch in () if scores else (NO_NLTK, NO_JIEBA):
                stack.enter_context(installed(patch))
            yield
    finally:
        # Later imports get the real modules.
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def parser_alone() -> Iterator[None]:
    """While LLaMA-Factory's parsers are imported, in a process that loads no model: no PEFT and no
    TRL, of which they take two names of files. A third of their time."""
    absent = [name for name in ("peft", "peft.utils", "trl") if name not in sys.modules]
    for name in absent:
        module = ModuleType(name)
        # Whether there is such a package is asked by its spec.
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    vars(sys.modules["peft.utils"]).update(PEFT_NAMES)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
