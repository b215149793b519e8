"""What LLaMA-Factory's start loads and this job has no use for is left alone.

Each job waits for its imports before its first batch. Measured on two cores with the modules of
the lock, of 7 s from start to first batch: bitsandbytes 1.6 s (it prepares torch's compiler),
scikit-learn 0.5 s, the trainers of other stages 0.4 s, the scores of text 0.2 s. Nothing here
changes what is computed: what is left out is code that this job would not call.
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
    """Call it before LLaMA-Factory is imported: keep other libraries to what they need."""
    for patch in (NO_SKLEARN, NO_BNB, NO_BNB_4BIT):
        install(patch)


@contextlib.contextmanager
def only(stage: str, *, scores: bool) -> Iterator[None]:
    """While LLaMA-Factory's tuner is imported: the trainer of one stage, no other.

    `scores`: whether ROUGE and BLEU of generated text will be asked for.
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
        # Whoever asks for one of them later gets the real one.
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
