"""RUN/bundle, the merge bundle: all files of the merged model except its weights.

With it a run can be merged where LLaMA-Factory is not installed.

The training makes it at its end, with LLaMA-Factory still loaded. If that was not possible,
`python -m tunesmith.job.merge.bundle --run RUN` makes it in a process with LLaMA-Factory. Neither
reads the base model's weights. A pull downloads it with the adapter. A merge that finds a bundle
with its own key uses it instead of starting LLaMA-Factory again. Files identical to one in the
adapter's folder or in the base model are listed but not copied: a merge needs both anyway.
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

FOLDER = "bundle"
MANIFEST = "bundle.json"
LOG = "bundle.log"
_PART = ".bundle.part"
_LOCK = ".bundle.lock"
# The folder that holds a file of the merged model: the bundle's, the adapter's, the base model's.
Source = Literal["bundle", "adapter", "base"]
_BUNDLE: Source = "bundle"
_ADAPTER: Source = "adapter"
_BASE: Source = "base"
# Bytes needed in a process that has loaded LLaMA-Factory; 150 MB were measured.
_MEMORY = 500_000_000
# Options that change how models are loaded in the process that trained.
_CHANGE_LOADING = ("deepspeed", "fsdp", "use_unsloth", "use_unsloth_gc", "use_ray")


# Writes all files but the weights into a folder; returns the weights files and the prompts.
Maker = Callable[[Path], "tuple[list[Shard], ParityRecord]"]


@dataclass(frozen=True)
class BundledFile:
    """A file of the merged model: the folder that holds it and its sha256."""

    sha256: str
    source: Source = named("in")


@dataclass(frozen=True)
class _ManifestRecord:
    """bundle.json."""

    key: str
    shards: Values  # skeleton.Layout
    prompts: Values  # parity.json's content
    files: Mapping[str, BundledFile]


@dataclass(frozen=True)
class BundleManifest:
    """The merge a bundle was made for, and its files."""

    key: str  # key_of() of the merge it belongs to
    shards: list[Shard]
    prompts: ParityRecord
    files: Mapping[str, BundledFile]

    @classmethod
    def read(cls, folder: Path) -> BundleManifest:
        """Read a bundle's manifest; it may come from a host. Raises UsageError."""
        file, remedy = folder / MANIFEST, f"delete {folder}, and pull or merge again"
        record = read_record(file, _ManifestRecord, remedy)
        # Files are written under these names.
        for key, names in (("shards", record.shards), ("files", record.files)):
            for name in names:
                if "/" in name or not part_of_allowed(f"{MERGED}/{name}"):
                    raise DamagedError(file, f"{key} lists a file {ascii(name)[:90]}", remedy)
        prompts = cast("ParityRecord", record.prompts)
        return cls(record.key, skeleton.shards_of(record.shards), prompts, record.files)

    def write(self, folder: Path) -> None:
        """Write it into a bundle's folder."""
        layout = skeleton.layout_of(self.shards)
        record = _ManifestRecord(self.key, layout, self.prompts, self.files)
        write_json(folder / MANIFEST, encode(record))


@dataclass(frozen=True)
class MergeBundle:
    """A bundle that fits a merge; it replaces the process of job/merge/skeleton.py."""

    folder: Path
    part: Path  # the merged model is assembled here
    sources: Mapping[Source, Path]
    manifest: BundleManifest

    def files(self) -> list[Shard]:
        """Return the weights files of the export."""
        return self.manifest.shards

    def prompts(self) -> ParityRecord:
        """Copy all files but the weights into `part`; return the content of parity.json."""
        for name, file in self.manifest.files.items():
            source = self.sources[file.source] / name
            if not source.is_file() or sha256_of(source) != file.sha256:
                raise TunesmithError(
                    f"{source}: not the file listed in {MANIFEST}: delete {self.folder}, and pull "
                    "or merge again"
                )
            shutil.copyfile(source, self.part / name)
        return self.manifest.prompts.copy()


def key_of(request: RunRequest, config: Config, keys: Config) -> str:
    """Return the identity of a merge: the run's config, its base model and its merge options.

    Paths are left out of the config: they differ between machines, and a pulled run has none.
    """
    plain = config_of(config)
    base = encode(request.model.files) if request.model else {}
    identity = {"config": plain, "keys": dict(keys), "base": base, "run": request.run_id}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def find(run_dir: Path, part: Path, request: RunRequest, merge: MergeInputs) -> MergeBundle | None:
    """Return the run's bundle if it was made for exactly this merge."""
    folder = run_dir / FOLDER
    if not (folder / MANIFEST).is_file():
        return None
    manifest = BundleManifest.read(folder)
    if manifest.key != key_of(request, merge.config, merge.keys):
        return None
    sources = {_BUNDLE: folder, _ADAPTER: Path(merge.adapters[-1]), _BASE: merge.base}
    return MergeBundle(folder, part, sources, manifest)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Hold the bundle's lock. A process whose client lost its connection may still hold it."""
    with (run_dir / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(run_dir: Path) -> None:
    """Make the run's bundle in a separate process, unless it exists.

    Raises TunesmithError if the run cannot be merged on another machine.
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
    """Make the bundle in the training process; return the seconds, or None if it was not made.

    LLaMA-Factory is already loaded here; a separate process would spend most of its time loading
    it. A training never fails because of the bundle: a note says why the merge will have to make
    it. It is made only for a run that will be merged block by block, and only if a single process
    trained: parsing its arguments, LLaMA-Factory opens a process group, and one rank of several
    would wait there for ranks that have ended.
    """
    started = time.monotonic()
    if request.merge is None or rank_count() > 1:
        return None
    try:
        try:
            merge = inputs.read(run_dir, request)
        except UsageError:
            return None  # nothing to merge; the merge reports it
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
    """Return why the training process cannot make the bundle, None if it can."""
    if (run_dir / _PART).exists():
        return "an earlier training died while making it"
    changed = [key for key in _CHANGE_LOADING if merge.config.get(key)]
    if changed or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return f"{(changed or ['fsdp'])[0]} changes how models are loaded"
    free = resources.memory_available()
    if free < _MEMORY:
        return f"{formats.size(free)} of memory are free, {formats.size(_MEMORY)} needed"
    return None


def _made_here(part: Path, merge: MergeInputs) -> tuple[list[Shard], ParityRecord]:
    shards: list[Shard] = []
    prompts = skeleton.make(part, merge.config, merge.keys, shards.extend)
    return shards, prompts


def _keep(run_dir: Path, request: RunRequest, merge: MergeInputs, maker: Maker) -> None:
    """Make RUN/bundle, completely or not at all."""
    part = run_dir / _PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        shards, prompts = maker(part)
        files: dict[str, BundledFile] = {}
        for file in sorted(part.iterdir()):
            digest = sha256_of(file)
            others = ((_ADAPTER, Path(merge.adapters[-1])), (_BASE, merge.base))
            twin = next((s for s, f in others if _same(f / file.name, file, digest)), None)
            files[file.name] = BundledFile(digest, twin or _BUNDLE)
            if twin:
                file.unlink()
        key = key_of(request, merge.config, merge.keys)
        BundleManifest(key, shards, prompts, files).write(part)
        seals.forget(run_dir, (FOLDER,))
        put_in_place(part, run_dir / FOLDER)
        hashes = {f"{FOLDER}/{name}": {"sha256": file.sha256} for name, file in files.items()}
        seals.seal(run_dir, FOLDER, (FOLDER,), hashes)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _same(twin: Path, file: Path, digest: str) -> bool:
    if file.name == INDEX or not twin.is_file() or twin.stat().st_size != file.stat().st_size:
        return False
    return sha256_of(twin) == digest


def main(argv: Sequence[str] | None = None) -> int:
    """Make the bundle of a run; its log is RUN/bundle.log."""
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
