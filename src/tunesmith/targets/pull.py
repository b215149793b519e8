"""Bring a run from a host: complete, of known files only, and at every moment old or new.

Nothing a host says is believed: its list is read by types, names and sizes (`listed`), what arrived
is looked at without following a link and compared with the list, and its request, config and status
are not used but read (job/run/foreign.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tunesmith.core import formats
from tunesmith.core.callbacks import Bar, OnText
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_file, sha256_of, write_json
from tunesmith.core.swap import put_in_place, recover
from tunesmith.hosts import transfer
from tunesmith.hosts.remote import Remote
from tunesmith.job.run import foreign, seals
from tunesmith.job.run.allowed import MOST_FILES, RECORD, largest, part_of_allowed, stays, told
from tunesmith.job.run.codec import encode
from tunesmith.job.run.folder import COPY_FILE, HOST_FOLDER, MERGED, RunFolder
from tunesmith.job.run.manifest import OF_MERGED, part_of
from tunesmith.job.run.replies import Manifest
from tunesmith.job.run.schema import CopyRecord, FileRecord
from tunesmith.job.run.stored import DamagedError
from tunesmith.targets import local_phases
from tunesmith.targets.local_phases import PHASES_OF

_NAMES_TOLD = 5

Records = Mapping[str, FileRecord]


@dataclass(frozen=True)
class Host:
    """Where a run is brought from, and who hears of it."""

    name: str
    remote: Remote
    folder: str  # of the run, there
    tell: OnText
    bar: Bar


@dataclass(frozen=True)
class Listing:
    """What a host has of a run: files of known names, and how many others."""

    files: Records
    left: int = 0
    names: tuple[str, ...] = field(default=())


def listed(reply: Manifest, host: str, run_id: str) -> Listing:
    """Return a host's list of a run's files, read by types.

    Files that are no part of a run are left out and counted. Raises TunesmithError naming the
    field for what is no list of files, and UsageError where the run's output lies elsewhere.
    """

    def refused(why: str) -> TunesmithError:
        return TunesmithError(f"{host}: its list of run {run_id}: {why}; nothing was pulled")

    files = reply.files
    if len(files) > MOST_FILES:
        raise refused(f"{len(files)} files, {MOST_FILES} at most expected")
    names = list(reply.left.names)[:_NAMES_TOLD]
    others = reply.left.count
    found: dict[str, FileRecord] = {}
    for name, record in files.items():
        if part_of_allowed(name) is None:
            if not stays(name):
                names.append(name)
                others += 1
            continue
        if record.size > largest(name):
            size, most = formats.size(record.size), formats.size(largest(name))
            raise refused(f"files.{name}: {size}, {most} at most expected")
        if record.path is not None:
            folder = str(PurePosixPath(record.path).parent)
            shown = "".join(letter if letter.isprintable() else "?" for letter in folder)
            raise UsageError(
                f"run {run_id}: its output_dir lies outside the run's folder and is not pulled; "
                f"copy it by hand: scp -r {shlex.quote(f'{host}:{shown}')} ."
            )
        found[name] = FileRecord(record.size, record.sha256)
    for name in found:
        inside = [str(p) for p in PurePosixPath(name).parents if str(p) in found]
        if inside:
            raise refused(f"files.{name} lies below the file {inside[0]}")
    if "run.json" not in found:
        raise refused("run.json is missing")
    return Listing(found, others, tuple(names[:_NAMES_TOLD]))


def bring(
    host: Host,
    manifest: Callable[[Sequence[str]], Manifest],
    run_id: str,
    parts: Sequence[str],
    folder: Path,
    home: Path,
    *,
    exact: bool,
    worked_in: bool = False,
) -> None:
    """Make `folder` a copy of parts of a run: every sha256 is the host's, or none is new.

    `manifest` asks the host for its list of some parts; `home` is .tunesmith. What was cut off is
    gone on with. Other parts that were brought before stay as they are, and so do files that were
    made here (a report) and, in a folder that is `worked_in`, the record of it. Unless `exact`, a
    file that changes meanwhile is taken as it came. Raises UsageError while another command brings
    the same run.
    """
    staging = home / "incoming" / f"{host.name}-{run_id}"
    with _alone(staging, run_id, host.name):
        recover(folder.parent)
        copy = RunFolder(folder)
        had = copy.copied().files if copy.is_copy else {}
        had_allowed = {name: had[name] for name in had if part_of_allowed(name)}
        asked = {RECORD, *parts}
        others = sorted({part_of(name) for name in had_allowed} - asked)
        listing = listed(manifest((*parts, *others)), host.name, run_id)
        here = {
            name
            for name in plain_files(folder)
            if name != COPY_FILE and not name.startswith(f"{HOST_FOLDER}/")
        }
        wanted, kept, own = _divided(listing.files, had, here, asked)
        kept = {name: kept[name] for name in kept if name in had_allowed}
        staging.mkdir(parents=True, exist_ok=True)
        _clear(staging, wanted.keys())
        missing = _fetch(host, folder, staging, wanted)
        wrong = [name for name in missing if not _same(staging / name, wanted[name])]
        if wrong and exact:
            for name in wrong:
                (staging / name).unlink(missing_ok=True)
            raise TunesmithError(
                f"run {run_id}: {wrong[0]} has changed while it was fetched; the same command "
                "fetches it again",
                wrong,
            )
        if exact:
            # The host compared them, too; it may be wrong, or not say so.
            seals.refuse_other(staging, wanted)
        for name in own | kept.keys():
            _link(folder / name, staging / name)
        seals.keep(folder, staging, own | kept.keys())
        try:
            foreign.adopt(staging, run_id, folder)
        except DamagedError as error:
            raise TunesmithError(
                f"{host.name}: run {run_id}: its {error.path.name} is damaged there: {error.why}; "
                "nothing was pulled"
            ) from None
        brought = {part_of(name) for name in wanted}
        done = local_phases.worked(folder, staging, had, brought) if worked_in and had else None
        phases = local_phases.put(done, folder, staging, wanted.keys()) if done else []
        write_json(staging / COPY_FILE, encode(CopyRecord(host.name, kept | wanted)))
        for name in missing:
            if (staging / name).exists():
                fsync_file(staging / name)
        put_in_place(staging, folder)
    if listing.left:
        host.tell(
            f"left on {host.name}, no part of a run's results: {told(listing.names, listing.left)}"
        )
    if phases:
        host.tell(f"{', '.join(phases)}: done here, stays")
    for part in sorted(PHASES_OF.keys() & brought & set(map(part_of, here - had.keys()))):
        host.tell(f"{part}: {host.name}'s has taken the place of what was made here")
    for part in others:
        if _of(part, listing.files) not in ({}, _of(part, kept)):
            host.tell(
                f"{part}: stays as it was pulled before, {host.name} has another now: "
                f"`inv pull --on {host.name} --run {run_id} --what {part}` brings it"
            )


def _fetch(host: Host, folder: Path, staging: Path, wanted: Records) -> list[str]:
    """Bring what of `wanted` is not in `folder` into `staging`; return the names of it."""
    for name in wanted:
        aside = folder / HOST_FOLDER / name
        known = aside if aside.is_file() else folder / name
        if not (staging / name).exists() and _same(known, wanted[name]):
            _link(known, staging / name)
    missing = [name for name in wanted if not _same(staging / name, wanted[name])]
    for name in missing:
        if (staging / name).exists() and (staging / name).stat().st_nlink > 1:
            # rsync will write into the file: not into one that `folder` shares.
            (staging / name).unlink()
    if missing:
        sizes = {name: wanted[name].size for name in missing}
        size = formats.size(sum(sizes.values()))
        host.tell(f"pulling {len(missing)} files ({size}) from {host.name}")
        with host.bar("pulling") as moved:
            transfer.download(host.remote, host.folder, sizes, staging, host.tell, moved)
        # Whatever the other end sent: only what was asked for stays, and only plain files.
        _clear(staging, wanted.keys())
    return missing


def plain_files(folder: Path) -> set[str]:
    """Return the plain files below a folder by their relative names; links are not followed."""
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if _kind(path) == "file"
    }


def _clear(staging: Path, wanted: Set[str]) -> None:
    """Remove everything that is not a plain file of `wanted`, or a folder of one."""
    folders = {str(parent) for name in wanted for parent in PurePosixPath(name).parents}

    def clear(folder: Path) -> None:
        for path in list(folder.iterdir()):
            name, kind = path.relative_to(staging).as_posix(), _kind(path)
            if kind == "folder":
                if name in folders:
                    clear(path)
                else:
                    shutil.rmtree(path)
            elif kind != "file" or name not in wanted:
                path.unlink()

    clear(staging)


def _kind(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return "none"
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


@contextlib.contextmanager
def _alone(staging: Path, run_id: str, host: str) -> Iterator[None]:
    """Keep other commands from the folder of what is under way."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(staging.with_name(f".{staging.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"run {run_id} is being pulled from {host} by another command",
            hint="wait for its end",
        ) from None
    else:
        yield
    finally:
        os.close(descriptor)


def _same(path: Path, record: FileRecord) -> bool:
    return (
        _kind(path) == "file"
        and path.stat().st_size == record.size
        and sha256_of(path) == record.sha256
    )


def _divided(
    there: Records, had: Records, here: Set[str], asked: Set[str]
) -> tuple[dict[str, FileRecord], dict[str, FileRecord], set[str]]:
    """Return what of a run is to be brought, what stays of an earlier pull, and what was made here.

    `there` and `had` are the host's files now and at the last pull; `asked` are parts.
    """
    wanted = {name: there[name] for name in there if part_of(name) in asked}
    kept = {name: had[name] for name in had.keys() & here if part_of(name) not in asked}
    own = {name for name in here if name not in had}
    merged_here = MERGED in map(part_of, own)
    # The host's replaces what was made here: never a mixture of both.
    replaced = PHASES_OF.keys() & set(map(part_of, wanted))
    own = {name for name in own if part_of(name) not in replaced}
    # A merged model has its own proof or none, not that of the other.
    if merged_here and MERGED in replaced:
        own -= set(OF_MERGED)
    elif merged_here:
        wanted = {name: wanted[name] for name in wanted if name not in OF_MERGED}
    return wanted, kept, own - wanted.keys()


def _of(part: str, files: Records) -> dict[str, FileRecord]:
    return {name: record for name, record in files.items() if part_of(name) == part}


def _link(file: Path, name: Path) -> None:
    """Give a file a second name: nothing here writes into a file that is there."""
    name.parent.mkdir(parents=True, exist_ok=True)
    name.hardlink_to(file)
