"""RUN/around, the merge bundle: all of the merged model but its weights.

With it a run is merged where LLaMA-Factory is not installed.

A training makes it at its end, where LLaMA-Factory is loaded already; where that was not possible
`python -m tunesmith.job.merge.bundle --run RUN` makes it, by a process with LLaMA-Factory. Neither
reads the base model's weights. A pull brings it with the adapter. A merge that finds one with its
own key uses it instead of starting LLaMA-Factory again. Files that equal one of the
adapter's folder or of the base model are only named: both have to be there anyway.
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
from typing import TYPE_CHECKING, Literal, cast

from tunesmith.basemodel.files import INDEX
from tunesmith.core import formats
from tunesmith.core.documents import Config
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of, write_json
from tunesmith.core.swap import put_in_place
from tunesmith.job.merge import inputs, skeleton
from tunesmith.job.merge.inputs import MergeInputs, requires_full_merge
from tunesmith.job.merge.streaming import Shard
from tunesmith.job.run import integrity, seals
from tunesmith.job.run.allowed import part_of_allowed
from tunesmith.job.run.codec import encode, named
from tunesmith.job.run.folder import MERGED, RunFolder
from tunesmith.job.run.foreign import config_of
from tunesmith.job.run.process import rank_count
from tunesmith.job.run.schema import RunRequest, Values
from tunesmith.job.run.stored import DamagedError, read_record
from tunesmith.job.system import resources

if TYPE_CHECKING:
    from tunesmith.job.prompts.records import ParityRecord

FOLDER = "around"
RECORD = "kit.json"
LOG = "around.log"
_PART = ".around.part"
_LOCK = ".around.lock"
# Where a file of the merged model lies: in the bundle, with the adapter, with the base model.
Place = Literal["around", "adapter", "base"]
_HERE: Place = "around"
_ADAPTER: Place = "adapter"
_BASE: Place = "base"
# Bytes it takes in a process that has LLaMA-Factory loaded, measured 150 MB.
_MEMORY = 500_000_000
# Ways to train after which models are loaded otherwise in the same process.
_CHANGE_LOADING = ("deepspeed", "fsdp", "use_unsloth", "use_unsloth_gc", "use_ray")


# Writes everything around the weights into a folder; returns weights files and prompts.
Maker = Callable[[Path], "tuple[list[Shard], ParityRecord]"]


@dataclass(frozen=True)
class BundledFile:
    """A file of the merged model: where it lies and its sha256."""

    sha256: str
    place: Place = named("in")


@dataclass(frozen=True)
class _ManifestRecord:
    """kit.json."""

    key: str
    shards: Values  # skeleton.Layout
    prompts: Values  # parity.json's content
    files: Mapping[str, BundledFile]


@dataclass(frozen=True)
class BundleManifest:
    """What a bundle was made for, and what it holds."""

    key: str  # key_of the merge it belongs to
    shards: list[Shard]
    prompts: ParityRecord
    files: Mapping[str, BundledFile]

    @classmethod
    def read(cls, folder: Path) -> BundleManifest:
        """Read a bundle's manifest; it may come from a host. Raises UsageError."""
        file, remedy = folder / RECORD, f"delete {folder}, and pull or merge again"
        record = read_record(file, _ManifestRecord, remedy)
        # Files are written under these names.
        for key, names in (("shards", record.shards), ("files", record.files)):
            for name in names:
                if "/" in name or not part_of_allowed(f"{MERGED}/{name}"):
                    raise DamagedError(file, f"{key} names a file {ascii(name)[:90]}", remedy)
        prompts = cast("ParityRecord", record.prompts)
        return cls(record.key, skeleton.shards_of(record.shards), prompts, record.files)

    def write(self, folder: Path) -> None:
        """Write it into a bundle's folder."""
        layout = skeleton.layout_of(self.shards)
        record = _ManifestRecord(self.key, layout, self.prompts, self.files)
        write_json(folder / RECORD, encode(record))


@dataclass(frozen=True)
class MergeBundle:
    """A bundle that fits a merge; it stands in for the process of job/merge/skeleton.py."""

    folder: Path
    part: Path  # where the merged model is put together
    places: Mapping[Place, Path]
    manifest: BundleManifest

    def files(self) -> list[Shard]:
        """Return the weights files of the export."""
        return self.manifest.shards

    def prompts(self) -> ParityRecord:
        """Put everything around the weights in its place; return parity.json's content."""
        for name, file in self.manifest.files.items():
            source = self.places[file.place] / name
            if not source.is_file() or sha256_of(source) != file.sha256:
                raise TunesmithError(
                    f"{source}: not the file {RECORD} names: delete {self.folder}, and pull or "
                    "merge again"
                )
            shutil.copyfile(source, self.part / name)
        return self.manifest.prompts.copy()


def key_of(request: RunRequest, config: Config, keys: Config) -> str:
    """Return what a bundle belongs to: the run's config and base model, and how it is merged.

    Of the config what holds on every machine: paths differ, and a pulled run has no more.
    """
    plain = config_of(config)
    base = encode(request.model.files) if request.model else {}
    identity = {"config": plain, "keys": dict(keys), "base": base, "run": request.run_id}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def find(run_dir: Path, part: Path, request: RunRequest, merge: MergeInputs) -> MergeBundle | None:
    """Return the run's bundle if it was made for this very merge."""
    folder = run_dir / FOLDER
    if not (folder / RECORD).is_file():
        return None
    manifest = BundleManifest.read(folder)
    if manifest.key != key_of(request, merge.config, merge.keys):
        return None
    places = {_HERE: folder, _ADAPTER: Path(merge.adapters[-1]), _BASE: merge.base}
    return MergeBundle(folder, part, places, manifest)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Wait for another process that makes the run's bundle: one of a client that was cut off."""
    with (run_dir / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(run_dir: Path) -> None:
    """Make the run's bundle in a process of its own, unless it is there.

    Raises whatever keeps the run from merging elsewhere.
    """
    request = RunFolder(run_dir).request()
    integrity.check_here(run_dir, "merge")
    merge = inputs.read(run_dir, request)
    if reason := merge.why_whole():
        raise requires_full_merge(run_dir, reason)

    def by_process(part: Path) -> tuple[list[Shard], ParityRecord]:
        with (
            (run_dir / LOG).open("wb") as log,
            skeleton.begin(run_dir, part, merge.config, merge.keys, log) as other,
        ):
            return other.files(), other.prompts()

    with alone(run_dir):
        if find(run_dir, run_dir, request, merge) is None:
            _keep(run_dir, request, merge, by_process)


def after_training(run_dir: Path, request: RunRequest, emit: Callable[..., None]) -> float | None:
    """Make the bundle in the process that trained; return the seconds, None if it was not made.

    LLaMA-Factory is loaded here already; a process of its own spends most of its time on that.
    No training fails for it: a note says why a merge will have to make it. It is made for a run
    that is to be merged by blocks, and where one process trained: to parse its arguments,
    LLaMA-Factory opens a process group, and one of several would wait there for ranks that
    have ended.
    """
    started = time.monotonic()
    if request.merge is None or rank_count() > 1:
        return None
    try:
        try:
            merge = inputs.read(run_dir, request)
        except UsageError:
            return None  # there is nothing to merge, as a merge will report
        if merge.why_whole():
            return None
        why = _why_not_here(run_dir, merge)
        if why is None:
            with alone(run_dir):
                if find(run_dir, run_dir, request, merge) is None:
                    _keep(run_dir, request, merge, lambda part: _made_here(part, merge))
    except Exception as error:  # noqa: BLE001 - the trained adapter is worth more than a bundle
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        shutil.rmtree(run_dir / _PART, ignore_errors=True)
        emit("note", text=f"no merge bundle made after the training, a merge will make it: {why}")
        return None
    return round(time.monotonic() - started, 2)


def _why_not_here(run_dir: Path, merge: MergeInputs) -> str | None:
    """Return why the training process must not make the bundle; None: it may."""
    if (run_dir / _PART).exists():
        return "an earlier training died while making it"
    changed = [key for key in _CHANGE_LOADING if merge.config.get(key)]
    if changed or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return f"{(changed or ['fsdp'])[0]} changes how models are loaded"
    have = resources.memory_available()
    if have < _MEMORY:
        return f"{formats.size(have)} of memory are free, {formats.size(_MEMORY)} needed"
    return None


def _made_here(part: Path, merge: MergeInputs) -> tuple[list[Shard], ParityRecord]:
    shards: list[Shard] = []
    prompts = skeleton.make(part, merge.config, merge.keys, shards.extend)
    return shards, prompts


def _keep(run_dir: Path, request: RunRequest, merge: MergeInputs, maker: Maker) -> None:
    """Make RUN/around, whole or not at all."""
    part = run_dir / _PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        shards, prompts = maker(part)
        files: dict[str, BundledFile] = {}
        for file in sorted(part.iterdir()):
            digest = sha256_of(file)
            places = ((_ADAPTER, Path(merge.adapters[-1])), (_BASE, merge.base))
            twin = next((w for w, f in places if _same(f / file.name, file, digest)), None)
            files[file.name] = BundledFile(digest, twin or _HERE)
            if twin:
                file.unlink()
        key = key_of(request, merge.config, merge.keys)
        BundleManifest(key, shards, prompts, files).write(part)
        seals.forget(run_dir, (FOLDER,))
        put_in_place(part, run_dir / FOLDER)
        known = {f"{FOLDER}/{name}": {"sha256": file.sha256} for name, file in files.items()}
        seals.seal(run_dir, FOLDER, (FOLDER,), known)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _same(twin: Path, file: Path, digest: str) -> bool:
    if file.name == INDEX or not twin.is_file() or twin.stat().st_size != file.stat().st_size:
        return False
    return sha256_of(twin) == digest


def main(argv: Sequence[str] | None = None) -> int:
    """Make the bundle of a run; its log is RUN/around.log."""
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
