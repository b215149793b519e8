"""Faster tokenizing of rows with LLaMA-Factory's own code.

Its code still processes every row: what is the question, where it is truncated, what is trained.
Only how rows are passed and written differs, which does not affect the result.
"""

from __future__ import annotations

import gc

from tunesmith.core.patching import install
from tunesmith.job.patches.datasets import INFER_TYPE_ONCE, REMEMBER_TYPE
from tunesmith.job.patches.llamafactory import CONVERT_IN_BATCHES
from tunesmith.job.patches.transformers import ENCODE_STRAIGHT


def hasten() -> None:
    """Install the patches that make tokenizing faster; the rows are the same. Imports libraries.

    Objects imported so far live until the process ends, so the garbage collector is told to skip
    them; scanning them every few hundred rows took a tenth of the time.
    """
    for patch in (ENCODE_STRAIGHT, CONVERT_IN_BATCHES, REMEMBER_TYPE, INFER_TYPE_ONCE):
        install(patch)
    gc.freeze()
