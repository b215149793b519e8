"""RUN/around: all of the merged model but its weights, to merge where LLaMA-Factory is not.

A training makes it at its end, where LLaMA-Factory is loaded already; where that was not possible
`python -m tunesmith.job.merge.bundle --run RUN` makes it, by a process with LLaMA-Factory. Neither
reads the base model's weights. A pull brings it with the adapter. A merge that finds one made for
just this merge takes it instead of asking LLaMA-Factory again. Files that equal one of the
adapter's folder or of the base model are only named: they are there already, or come anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.basemodel.files import INDEX
from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of, write_json
from tunesmith.core.swap import put_in_place
from tunesmith.job.merge import inputs, skeleton
from tunesmith.job.merge.inputs import Mergeable, only_whole
from tunesmith.job.merge.streaming import Shard
from tunesmith.job.run import integrity, seals
from tunesmith.job.run.allowed import part_of_allowed
from tunesmith.job.run.codec import encode, named
from tunesmith.job.run.folder import MERGED, RunFolder
from tunesmith.job.run.foreign import config_of
from tunesmith.job.run.schema import RunRequest, Values
from tunesmith.job.run.stored import DamagedError, read_record
from tunesmith.job.system import resources

FOLDER = "around"
RECORD = "kit.json"
LOG = "around.log"
_PART = ".around.part"
_LOCK = ".around.lock"
# Where a file of the merged model lies: in the kit, with the adapter, with the base model.
_HERE, _ADAPTER, _BASE = "around", "adapter", "base"
# Bytes it takes in a process that has LLaMA-Factory loaded, measured 150 MB.
_ROOM = 500_000_000
# Ways to train after which models are loaded otherwise in the same process.
_CHANGE_LOADING = ("deepspeed", "fsdp", "use_unsloth", "use_unsloth_gc", "use_ray")


@dataclass(frozen=True)
class _KitFile:
    """Where a file of the merged model lies (_HERE, _ADAPTER or _BASE), and its sha256."""

    sha256: str
    place: Literal["around", "adapter", "base"] = named("in")


@dataclass(frozen=True)
class _KitRecord:
    """kit.json: what a kit belongs to, the weights files to make, parity.json's content, and all
    other files of the merged model."""

    key: str
    shards: Values
    prompts: Values
    files: Mapping[str, _KitFile]


def _read(file: Path, remedy: str) -> _KitRecord:
    record = read_record(file, _KitRecord, remedy)
    # It may come from a host, and files are written under these names.
    for key, names in (("shards", record.shards), ("files", record.files)):
        for name in names:
            if "/" in name or not part_of_allowed(f"{MERGED}/{name}"):
                raise DamagedError(file, f"{key} names a file {ascii(name)[:90]}", remedy)
    return record


# What writes everything around the weights into a folder: weights files, parity.json's content.
Maker = Callable[[Path], tuple[Mapping[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Kit:
    """A kit that fits; it answers what the process of job/merge/skeleton.py would be asked."""

    folder: Path
    part: Path  # where the merged model is put together
    places: Mapping[str, Path]
    record: _KitRecord

    def files(self) -> list[Shard]:
        """Return the weights files of the export."""
        return skeleton.shards_of(self.record.shards)

    def prompts(self) -> dict[str, Any]:
        """Put everything around the weights in its place; return parity.json's content."""
        for name, known in self.record.files.items():
            source = self.places[known.place] / name
            if not source.is_file() or sha256_of(source) != known.sha256:
                raise TunesmithError(
                    f"{source}: not the file {RECORD} names: delete {self.folder}, and pull or "
                    "merge again"
                )
            shutil.copyfile(source, self.part / name)
        return dict(self.record.prompts)


def key_of(request: RunRequest, config: Mapping[str, Any], keys: Mapping[str, Any]) -> str:
    """Return what a kit belongs to: the run's config and base model, and how it is merged.

    Of the config what holds on every machine: paths differ, and a pulled run has no more.
    """
    plain = config_of(config)
    base = encode(request.model.files) if request.model else {}
    told = {"config": plain, "keys": dict(keys), "base": base, "run": request.run_id}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def find(run_dir: Path, part: Path, request: RunRequest, asked: Mergeable) -> Kit | None:
    """Return the run's kit if it was made for just what is asked."""
    folder = run_dir / FOLDER
    if not (folder / RECORD).is_file():
        return None
    record = _read(folder / RECORD, f"delete {folder}, and pull or merge again")
    if record.key != key_of(request, asked.config, asked.keys):
        return None
    places = {_HERE: folder, _ADAPTER: Path(asked.adapters[-1]), _BASE: asked.base}
    return Kit(folder, part, places, record)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Wait for another maker of the run's kit: that of a client whose line was cut works on."""
    with (run_dir / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(run_dir: Path) -> None:
    """Make the run's kit by a process of its own, unless it is there.

    Raises what keeps the run from merging elsewhere.
    """
    request = RunFolder(run_dir).request()
    integrity.check_here(run_dir, "merge")
    asked = inputs.read(run_dir, request)
    if reason := asked.why_whole():
        raise only_whole(run_dir, reason)

    def by_process(part: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
        with (
            (run_dir / LOG).open("wb") as log,
            skeleton.begin(run_dir, part, asked.config, asked.keys, log) as other,
        ):
            return skeleton.told_of(other.files()), other.prompts()

    with alone(run_dir):
        if find(run_dir, run_dir, request, asked) is None:
            _keep(run_dir, request, asked, by_process)


def after_training(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> float | None:
    """Make the kit in the process that trained; return the seconds it took, None without one.

    LLaMA-Factory is loaded here, which takes a process of its own most of the time. No training
    fails for it: why a merge will have to make it is told as a note. One process of several does
    it; nothing is made for a run that is not to be merged, or not by blocks.
    """
    started = time.monotonic()
    if request.merge is None or int(os.environ.get("RANK", "0")) != 0:
        return None
    try:
        try:
            asked = inputs.read(run_dir, request)
        except UsageError:
            return None  # there is nothing to merge, which a merge will say
        if asked.why_whole():
            return None
        why = _why_not_here(run_dir, asked)
        if why is None:
            with alone(run_dir):
                if find(run_dir, run_dir, request, asked) is None:
                    _keep(run_dir, request, asked, lambda part: _made_here(part, asked))
    except Exception as error:  # noqa: BLE001 - the trained adapter is worth more than a kit
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        shutil.rmtree(run_dir / _PART, ignore_errors=True)
        emit("note", text=f"all but the merged weights was not made yet, a merge will: {why}")
        return None
    return round(time.monotonic() - started, 2)


def _why_not_here(run_dir: Path, asked: Mergeable) -> str | None:
    """Return why the training process must not make the kit; None: it may."""
    if (run_dir / _PART).exists():
        return "a training ended while it made it"
    changed = [key for key in _CHANGE_LOADING if asked.config.get(key)]
    if changed or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return f"{(changed or ['fsdp'])[0]} changes how models are loaded"
    have = resources.memory_available()
    if have < _ROOM:
        return f"{formats.size(have)} of memory are free, {formats.size(_ROOM)} expected"
    return None


def _made_here(part: Path, asked: Mergeable) -> tuple[Mapping[str, Any], dict[str, Any]]:
    told: dict[str, Any] = {}
    skeleton.make(part, asked.config, asked.keys, told.__setitem__)
    return told["shards"], told["prompts"]


def _keep(run_dir: Path, request: RunRequest, asked: Mergeable, maker: Maker) -> None:
    """Make RUN/around, whole or not at all."""
    part = run_dir / _PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        shards, prompts = maker(part)
        files: dict[str, Any] = {}
        for file in sorted(part.iterdir()):
            digest = sha256_of(file)
            places = ((_ADAPTER, Path(asked.adapters[-1])), (_BASE, asked.base))
            twin = next((w for w, f in places if _same(f / file.name, file, digest)), None)
            files[file.name] = {"in": twin or _HERE, "sha256": digest}
            if twin:
                file.unlink()
        record = {
            "key": key_of(request, asked.config, asked.keys),
            "shards": shards,
            "prompts": prompts,
            "files": files,
        }
        write_json(part / RECORD, record)
        seals.forget(run_dir, (FOLDER,))
        put_in_place(part, run_dir / FOLDER)
        known = {f"{FOLDER}/{name}": file for name, file in files.items()}
        seals.seal(run_dir, FOLDER, (FOLDER,), known)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _same(twin: Path, file: Path, digest: str) -> bool:
    if file.name == INDEX or not twin.is_file() or twin.stat().st_size != file.stat().st_size:
        return False
    return sha256_of(twin) == digest


def main(argv: Sequence[str] | None = None) -> int:
    """Make the kit of a run; its log is RUN/around.log."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(prog="tunesmith.job.merge.bundle", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    try:
        make(parser.parse_args(argv).run)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
