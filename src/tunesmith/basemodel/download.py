"""Download one model from one endpoint and verify it. Standard library, Python 3.10.

huggingface_hub resumes files but checks only their size, does not survive a connection that breaks
inside a response body, and waits forever on some stalls (measured with 0.36.2). So this module
retries, detects stalls and verifies; huggingface_hub does the transfer, in a process of
`tunesmith.basemodel.hub_client`, into its own cache layout.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel import architecture, kinds
from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.endpoint import DownloadSpec, SourceError, Worker, reach
from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.judge import Seen
from tunesmith.core import disk, formats
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError

# Bytes that must stay free after a download, besides 5 % of its size.
_RESERVE = 1 << 30
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Progress:
    """The progress of a fetch: `done` of `total` bytes; `total` is None for a plain message."""

    what: str
    text: str
    done: int = 0
    total: int | None = None


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Snapshot:
    """A verified download: its folder in the cache, commit and files."""

    path: Path
    commit: str
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class _Remote:
    """A file in the hub's listing: `sha256` for LFS files, else `blob_id` (git's sha1)."""

    name: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id or ""


def download(order: DownloadSpec, endpoint: str, tell: OnProgress) -> Snapshot:
    """Download a model from one endpoint to huggingface_hub's cache, and verify every file.

    Raises SourceError if this endpoint cannot provide it, UsageError if the disk is too small or
    the model cannot be trained on.
    """
    reach(endpoint, order.mirror, order.limits.connect)
    healed: set[str] = set()
    while True:
        commit, files = _transfer(order, endpoint, tell)
        folder = order.storage / "snapshots" / commit
        records, wrong = _prove(folder, files, order.pins, tell)
        if not wrong:
            return Snapshot(folder, commit, records)
        for name in wrong:
            _remove(order.storage, folder / name)
        again = healed & set(wrong)
        if again:
            name = min(again)
            raise SourceError("checksum", f"{name}: {wrong[name]}, twice; removed")
        healed |= set(wrong)
        name, fault = next(iter(wrong.items()))
        tell(Progress("note", f"{name}: {fault}; removed, downloading it again"))


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Raise UsageError unless `needed` bytes plus 5 % and 1 GiB are free at `folder`."""
    if needed:
        detail = [f"{formats.size(needed)} + 5 % + 1 GiB reserve"]
        disk.require(folder, int(needed * 1.05) + _RESERVE, what, hint=hint, detail=detail)


def _transfer(
    order: DownloadSpec, endpoint: str, tell: OnProgress
) -> tuple[str, tuple[_Remote, ...]]:
    """Download until complete; retry as long as new bytes arrive."""
    limits = order.limits
    fruitless, most = 0, _held(order.storage)
    while True:
        try:
            return _attempt(order, endpoint, tell)
        except SourceError as error:
            received = _held(order.storage)
            fruitless = 1 if received > most else fruitless + 1
            most = max(most, received)
            if not error.retry or fruitless >= limits.attempts:
                raise
            pause = min(error.after or limits.pause * 2 ** (fruitless - 1), _LONGEST_PAUSE)
            tell(
                Progress(
                    "note",
                    f"{endpoint}: {error.text}; again in {formats.duration(pause)} "
                    f"({fruitless} of {limits.attempts})",
                )
            )
            time.sleep(pause)


def _attempt(
    order: DownloadSpec, endpoint: str, tell: OnProgress
) -> tuple[str, tuple[_Remote, ...]]:
    with Worker(order, endpoint) as worker:
        tell(Progress("look", f"{order.name}: asking {endpoint}"))
        listing = worker.await_listing(order.limits.listing)
        files = _chosen(order, listing)
        commit = str(listing["commit"])
        folder = order.storage / "snapshots" / commit
        missing = [file for file in files if not (folder / file.name).exists()]
        _drop_overlong(order.storage, missing)
        needed = max(0, sum(file.size for file in missing) - _held(order.storage))
        hint = "free space there, or set HF_HOME to a folder on a larger disk"
        require_space(order.hf_home, needed, order.name, hint)
        # The small files are judged before any weights are downloaded.
        small = [file for file in missing if not model_files.is_weights(file.name)]
        weights = [file for file in missing if model_files.is_weights(file.name)]
        if small:
            worker.take([file.name for file in small])
            _watch(worker, order, endpoint, sum(file.size for file in small), tell)
        size = sum(file.size for file in files if model_files.is_weights(file.name))
        names = [str(file["name"]) for file in listing["files"]]
        # Python is never taken: code of an author is not there, whether it may run or not.
        order.judge(Seen(order.name, folder, names, size))
        if weights:
            worker.take([file.name for file in weights])
            _watch(worker, order, endpoint, sum(file.size for file in weights), tell)
        return commit, files


def _watch(
    worker: Worker,
    order: DownloadSpec,
    endpoint: str,
    total: int,
    tell: OnProgress,
) -> None:
    """Follow a transfer to its end; stop it after `limits.stall` seconds without a new byte."""
    most, since = -1, time.monotonic()
    at_first = _complete(order.storage)
    for event in worker.events():
        done = _complete(order.storage) - at_first + _partial(order.storage)
        if done > most or event:
            most, since = max(done, most), time.monotonic()
        if time.monotonic() - since > order.limits.stall:
            text = f"no data received for {formats.duration(order.limits.stall)}"
            raise SourceError("cut", text, retry=True)
        tell(Progress("download", f"{order.name} from {endpoint}", min(done, total), total))


def _chosen(order: DownloadSpec, listing: JsonObject) -> tuple[_Remote, ...]:
    """Return the files to download, each with a checksum. Raises SourceError if that fails."""
    remote = {file["name"]: file for file in listing["files"]}
    if re.fullmatch(r"[0-9a-f]{40}", order.revision) and listing["commit"] != order.revision:
        raise SourceError("broken", f"it answers with commit {listing['commit']}")
    if order.kind not in kinds.ADAPTERS and (misfit := architecture.by_names(order.name, remote)):
        raise UsageError(f"{order.name}: {misfit.text}", hint=misfit.hint)
    names = kinds.choose(order.kind, remote, order.allow_pickle)
    weights = [name for name in names if name.endswith(".safetensors")]
    pickled = model_files.pickles(remote)
    if not weights and not order.allow_pickle and pickled:
        raise SourceError(
            "pickle",
            f"there are only pickled weights ({', '.join(pickled[:3])}), which can run code when "
            "loaded; `--allow-pickle` takes them from an author you trust",
        )
    if not weights and not (order.allow_pickle and pickled):
        raise SourceError("unfit", "there are no weights in it")
    files = []
    for name in names:
        entry = remote[name]
        file = _Remote(name, entry["size"] or 0, entry["sha256"], entry["blob_id"])
        if not file.etag or entry["size"] is None:
            raise SourceError("broken", f"it tells no checksum of {name}: it cannot be proven")
        pin = order.pins.get(name)
        if pin and (file.size, file.sha256 or pin.sha256) != (pin.size, pin.sha256):
            raise SourceError(
                "checksum",
                f"{name}: expected {pin.size} bytes, sha256 {pin.sha256} (configs/models.yml), it "
                f"has {file.size} bytes, sha256 {file.sha256}",
            )
        files.append(file)
    return tuple(files)


def _prove(
    folder: Path, files: Sequence[_Remote], pins: Mapping[str, FileRecord], tell: OnProgress
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Verify every file; return ({name: record}, {name: fault}).

    LFS files are compared with their sha256, the others with git's blob id (the sha1 of
    "blob <size>\\0" and the content), and pinned ones with their pin.
    """
    records, wrong = {}, {}
    total, done = sum(file.size for file in files), 0
    for file in files:
        sha256 = hashlib.sha256()
        size = (folder / file.name).stat().st_size
        blob = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        with (folder / file.name).open("rb") as stream:
            while piece := stream.read(1 << 20):
                sha256.update(piece)
                if not file.sha256:
                    blob.update(piece)
                done += len(piece)
                tell(Progress("verify", "checking sha256", done, total))
        found = sha256.hexdigest() if file.sha256 else blob.hexdigest()
        kind = "sha256" if file.sha256 else "git blob id"
        if size != file.size:
            wrong[file.name] = f"expected {file.size} bytes, found {size}"
        elif found != file.etag:
            wrong[file.name] = f"expected {kind} {file.etag}, found {found}"
        records[file.name] = record = FileRecord(size, sha256.hexdigest())
        if file.name in pins and record != pins[file.name] and file.name not in wrong:
            pinned = pins[file.name].sha256
            fault = f"expected sha256 {pinned} (configs/models.yml), found {record.sha256}"
            wrong[file.name] = fault
    return records, wrong


def _remove(storage: Path, pointer: Path) -> None:
    """Remove a file of the cache and the blob it points to."""
    blob = pointer.resolve()
    pointer.unlink(missing_ok=True)
    if storage.resolve() in blob.parents:
        blob.unlink(missing_ok=True)


def _drop_overlong(storage: Path, files: Sequence[_Remote]) -> None:
    # Resuming one would request bytes after the end and always get a 416.
    for file in files:
        part = storage / "blobs" / f"{file.etag}.incomplete"
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()


def _partial(storage: Path) -> int:
    return sum(_size(path) for path in (storage / "blobs").glob("*.incomplete"))


def _complete(storage: Path) -> int:
    blobs = (storage / "blobs").glob("*")
    return sum(_size(path) for path in blobs if path.suffix != ".incomplete")


def _held(storage: Path) -> int:
    """Return the bytes of a model on disk, including partial files."""
    return _complete(storage) + _partial(storage)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        # The worker renamed it after it was listed.
        return 0
