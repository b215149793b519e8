"""What each phase and verb reads, compared before it begins: results with their seals
(job/run/seals.py), inputs with the record of them (job/run/inputs.py). Standard library and yaml
only.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tunesmith.core import formats
from tunesmith.core.callbacks import OnBytes, OnText
from tunesmith.core.errors import UsageError
from tunesmith.job.run import config as run_config
from tunesmith.job.run import inputs, seals
from tunesmith.job.run import manifest as run_manifest
from tunesmith.job.run.adapters import refuse_code
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.remedies import new_run
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.run.seals import ANSWERS, REQUEST
from tunesmith.job.system import disk

# What reads the finished model, and as which one.
BASE, ADAPTER, MERGED = "base", "adapter", "merged"
EXPORT, REPORT = "export", "report"
# Phases in which rows are read, by the environment that the run was made with.
_TRAINING = ("before", "train", "after")
# The results that each phase or verb reads, besides run.json and config.yaml. Checkpoints have
# seals of their own. A proof compares the merged files with the sealed MANIFEST.json itself.
READS = {
    "after": ("output", "evaluation.json"),
    "merge": ("output", "bundle"),
    "proof": ("output", "parity.json", "before.jsonl"),
    ADAPTER: ("output",),
    MERGED: ("merged",),
    EXPORT: ("merged", "proof.json", "parity.json", "export.json"),
    REPORT: (*ANSWERS, "parity.json", "proof.json"),
}
_ANY_MODEL = (*_TRAINING, "merge", "proof", "predict", BASE, ADAPTER, EXPORT)
_OLDER = "made by an older version of tunesmith"
_CUT_OFF = f"not sealed: {_OLDER}, or its phase was cut off"


def check(run_dir: Path, use: str, say: OnText, tell: OnBytes = seals.unheard) -> None:
    """Compare all that a phase or verb reads. Raises UsageError for what was changed, OSError
    where a disk refuses (job/system/disk.py).

    `say` hears of what an older version has left without a record, `tell` the bytes read and
    their number where that takes longer than a second.
    """
    try:
        _check(run_dir, use, say, tell)
    except OSError as error:
        if disk.refused(error):
            raise  # it may take what it refuses now in a moment: the supervisor waits for it
        raise _unreadable(run_dir, error) from None


def _unreadable(run_dir: Path, error: OSError) -> UsageError:
    place = error.filename or run_dir
    return UsageError(f"{place}: {error.strerror}, so it cannot be compared; mend that")


def _check(run_dir: Path, use: str, say: OnText, tell: OnBytes) -> None:
    folder = RunFolder(run_dir)
    seals.check(run_dir, REQUEST, tell)
    if use in ("check", "fetch"):
        return
    request = folder.request()
    config = run_config.read_config(run_dir) if folder.config_file.is_file() else {}
    if use in _TRAINING:
        inputs.check_stack(run_dir, use)
        if not inputs.check_data(run_dir, request, inputs.TRAIN, tell) and use == "train":
            say(f"{_OLDER}: its data are not compared; {new_run(run_dir)} records them")
    if use == "predict":
        inputs.check_data(run_dir, request, inputs.PREDICT, tell)
    if use in _ANY_MODEL:
        inputs.check_model(run_dir, request, tell, unseen=use != "merge")
    if use in ("merge", "proof", ADAPTER):
        below = run_config.tuned_adapters(config, Path(str(config.get("output_dir"))))[:-1]
        inputs.check_adapters(run_dir, request, below, tell)
    elif use == BASE:
        inputs.check_adapters(run_dir, request, run_config.starting_adapters(config), tell)
    results = READS.get(use, ())
    if use == "predict":
        results = ("output",) if _of_the_run(run_dir, request) else ()
    found = seals.check(run_dir, results, tell)
    if found.unsealed:
        say(_told(run_dir, found.unsealed))
    if use == "proof":
        seals.check_files(run_dir, ("merged/MANIFEST.json",))
    if use in _ANY_MODEL:
        loaded = request.predict or {} if use == "predict" else config
        for name in (*run_config.starting_adapters(loaded), *run_config.other_adapters(loaded)):
            refuse_code(Path(name))
    if "output" in results:
        refuse_code(run_manifest.output_of(folder))


def _of_the_run(run_dir: Path, request: RunRequest) -> bool:
    """Whether a prediction reads the adapter of this run."""
    own = run_manifest.output_of(RunFolder(run_dir)).resolve()
    values = request.predict or {}
    return own in [Path(name).resolve() for name in run_config.starting_adapters(values)]


def _told(run_dir: Path, unsealed: tuple[str, ...]) -> str:
    """Return in words what was not sealed, and what renews it."""
    merged = {"merged", "parity.json", "proof.json"} >= set(unsealed)
    renew = f"`inv merge --run {run_dir.name}`" if merged else new_run(run_dir)
    return (
        f"{', '.join(unsealed)}: {_CUT_OFF}; as it is now it is sealed from here on, {renew} makes "
        "it anew"
    )


def check_here(run_dir: Path, use: str) -> None:
    """`check` for a verb in somebody's terminal or a service's log: what there is to say goes to
    stderr."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def tell(done: int, total: int) -> None:
        spent = formats.duration(time.monotonic() - began)
        say(f"comparing with seals: {formats.size(done)} of {formats.size(total)} ({spent})")

    try:
        check(run_dir, use, say, tell)
    except OSError as error:
        raise _unreadable(run_dir, error) from None
