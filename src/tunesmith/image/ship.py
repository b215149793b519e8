"""Send an image to a host's Docker over SSH, for hosts that reach no registry.

A docker archive is split into one compressed file per layer, named by the digest of its content.
Layers that an image of the host already has are skipped; rsync sends the others and resumes after
an interruption; on the host the archive is reassembled and loaded. The engine checks each layer's
digest, and finally the image's id, the digest of its list of layers, is compared.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import docker

from tunesmith.core import disk, formats
from tunesmith.core.callbacks import Bar, OnBytes, OnText, unseen
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import replacing, sha256_of
from tunesmith.core.printable import one_line
from tunesmith.hosts import transfer
from tunesmith.hosts.probe.answer import Answer
from tunesmith.hosts.probe.ask import ask
from tunesmith.hosts.probe.host import Disks, User
from tunesmith.hosts.probe.software import Engine
from tunesmith.hosts.remote import Remote
from tunesmith.image import engine

# On fast connections the CPU would be the limit: level 1 takes a third of the time of level 6 and
# costs 3 % in size on these layers.
_LEVEL = 1
# Bytes: larger than any list of layers or image config, smaller than any relevant layer.
_SMALL = 1 << 20
_FOLDER = ".cache/tunesmith/image"

# $1 folder, $2 tag: what arrived is compared with sums, then loaded; prints the image's id.
_LOAD = """
cd "$1" || exit 1
sha256sum --quiet --check sums >&2 || exit 3
tar -cf - manifest.json config.json $(sed 's/^[0-9a-f]*  //' sums | grep '\\.tar\\.gz$') |
    docker load >&2 || exit 4
docker image inspect --format '{{.Id}}' "$2"
"""
_CLEAN = 'cd "$1" && rm -f -- *.tar.gz manifest.json config.json sums && rm -rf .rsync-partial'


@dataclass(frozen=True)
class Archive:
    """An image as in a docker archive: config, and its layers' digests in order."""

    image_id: str
    tag: str
    config: bytes
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Far:
    """A host's engine: a folder for files, free bytes, and its images."""

    folder: str
    free_bytes: int
    images: tuple[tuple[str, tuple[str, ...]], ...]

    def has(self, image_id: str) -> bool:
        """Whether it has an image."""
        return any(found == image_id for found, _ in self.images)

    def shared(self, layers: Sequence[str]) -> int:
        """Return how many of the first layers an image there already has."""
        return max((_common(layers, theirs) for _, theirs in self.images), default=0)


def ship(
    client: docker.DockerClient,
    name: str,
    remote: Remote,
    cache: Path,
    tell: OnText,
    bar: Bar = unseen,
) -> bool:
    """Bring image `name` to a host's engine; return False when it was there already.

    `cache` is a folder here for the compressed layers, kept until the image has arrived, so
    that the same command goes on after any end of this one; `bar` shows what takes long. Raises
    UsageError when the host has no engine or no room, TunesmithError when something that arrived
    is not what was sent.
    """
    image = engine.find_image(client, name)
    far = look(remote)
    if far.has(str(image.id)):
        tell(f"{remote.name} has {name} ({str(image.id)[7:19]}) already")
        return False
    layers = tuple(image.attrs["RootFS"]["Layers"])
    there = far.shared(layers)
    archive = pack(client, name, layers, set(layers[there:]), cache, tell, bar)
    try:
        _bring(archive, there, remote, far, cache, tell, bar)
    except _NotLoaded:
        if not there:
            raise
        # An engine with another image store needs all of them.
        tell("the engine there wants every layer")
        archive = pack(client, name, layers, set(layers), cache, tell, bar)
        _bring(archive, 0, remote, far, cache, tell, bar)
    remote.run(_CLEAN, arguments=(far.folder,))
    shutil.rmtree(cache)
    tell(f"{remote.name} has {name} ({archive.image_id[7:19]})")
    return True


class _NotLoaded(TunesmithError):
    """The host's engine refused the archive."""


def look(remote: Remote) -> Far:
    """Ask a host for its engine. Raises UsageError when it has none that answers."""
    answer = ask(remote, User, Disks, Engine, timeout=120)
    engine = answered(answer)
    home = answer.of(User).home
    disk = answer.of(Disks).disk(home)
    if not home or disk is None:
        raise TunesmithError(f"{remote.name}: the room in {home or 'the home folder'} is unknown")
    return Far(f"{home}/{_FOLDER}", disk.free, engine.images)


def answered(answer: Answer) -> Engine:
    """Return a host's engine. Raises UsageError when it has none that answers."""
    engine, name = answer.of(Engine), answer.host
    if engine.state == "answers":
        return engine
    if engine.state == "absent":
        raise UsageError(
            f"{name}: there is no Docker",
            hint=f"a rented container has none and needs none: `inv provision --on {name}`",
        )
    if "permission denied" in engine.fault.lower():
        raise UsageError(
            f"{name}: this user has no access to Docker there",
            hint=f"run `ssh {name} sudo usermod -aG docker '$USER'`, then this again",
        )
    said = one_line(engine.fault) or "no word"
    raise UsageError(f"{name}: its Docker engine does not answer: {said}")


def pack(
    client: docker.DockerClient,
    name: str,
    layers: tuple[str, ...],
    wanted: set[str],
    cache: Path,
    tell: OnText,
    bar: Bar = unseen,
) -> Archive:
    """Create a compressed file of each wanted layer in `cache`; return the image's archive.

    Layers from an earlier attempt are reused.
    """
    image = engine.find_image(client, name)
    cache.mkdir(parents=True, exist_ok=True)
    config = cache / f"{str(image.id).partition(':')[2]}.json"
    missing = {layer for layer in wanted if not _file(cache, layer).is_file()}
    if missing or not config.is_file():
        tell(f"packing {len(missing)} of {len(layers)} layers of {name}")
        with engine.explained(f"{name}: docker save"), bar("packing") as moved:
            pieces = _counted(image.save(named=name), int(image.attrs["Size"]), moved)
            stream = io.BufferedReader(_Stream(pieces), 1 << 20)
            _take_apart(stream, missing, cache, config, tell)
    lacking = [layer for layer in wanted if not _file(cache, layer).is_file()]
    if lacking or not config.is_file():
        raise TunesmithError(f"{name}: docker save did not hold {len(lacking)} of its layers")
    return Archive(str(image.id), name, config.read_bytes(), layers)


def _take_apart(
    stream: IO[bytes], missing: set[str], cache: Path, config: Path, tell: OnText
) -> None:
    raw = cache / "layer.part"
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            if member.size < _SMALL:
                data = content.read()
                digest = hashlib.sha256(data).hexdigest()
                if digest == config.stem:
                    with replacing(config) as part:
                        part.write_bytes(data)
                if f"sha256:{digest}" in missing:
                    _compress(io.BytesIO(data), _file(cache, f"sha256:{digest}"))
                continue
            # The digest is known only at the end, and most layers may not be wanted.
            digest = f"sha256:{_copy(content, raw)}"
            if digest in missing:
                target = _file(cache, digest)
                with raw.open("rb") as layer:
                    _compress(layer, target)
                size, packed = formats.size(member.size), formats.size(target.stat().st_size)
                tell(f"  layer {digest[7:19]}: {size}, {packed} compressed")
    raw.unlink(missing_ok=True)


def _bring(
    archive: Archive, shared: int, remote: Remote, far: Far, cache: Path, tell: OnText, bar: Bar
) -> None:
    files = {_file(cache, layer).name: _file(cache, layer) for layer in archive.layers[shared:]}
    size = sum(file.stat().st_size for file in files.values())
    disk.require(
        remote.name,
        2 * size,
        f"sending and unpacking {archive.tag}",
        free=far.free_bytes,
        hint=f"free space with `ssh {remote.name} docker system prune`",
    )
    names = [_file(cache, layer).name for layer in archive.layers]
    listed = [{"Config": "config.json", "RepoTags": [archive.tag], "Layers": names}]
    small = {"manifest.json": json.dumps(listed).encode(), "config.json": archive.config}
    sums = {name: sha256_of(file) for name, file in files.items()}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    small["sums"] = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    for name, data in small.items():
        (cache / name).write_bytes(data)
    tell(f"sending {formats.size(size)} in {len(files)} layers ({shared} are there)")
    everything = files | {name: cache / name for name in small}
    with bar("sending") as moved:
        transfer.upload(remote, everything, far.folder, tell, moved)
    with bar(f"{remote.name}: loading"):
        done = remote.run(_LOAD, arguments=(far.folder, archive.tag), timeout=3600)
    errors = done.stderr.strip().splitlines()[-3:]
    if done.returncode == 3:
        remote.run(_CLEAN, arguments=(far.folder,))
        raise TunesmithError(
            f"{remote.name}: what arrived differs from what was sent, and was removed",
            errors,
            hint="run this again",
        )
    if done.returncode != 0:
        raise _NotLoaded(f"{remote.name}: its Docker does not load {archive.tag}", errors)
    found = one_line(done.stdout, 80)
    if found != archive.image_id:
        raise TunesmithError(
            f"{remote.name}: {archive.tag} arrived as {found}, but is {archive.image_id} here"
        )


def _counted(pieces: Iterable[bytes], total: int, moved: OnBytes) -> Iterator[bytes]:
    """Yield pieces of bytes, which are about `total` together, and tell how far they are."""
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        moved(min(done, total), total)


class _Stream(io.RawIOBase):
    """The SDK's byte chunks as a readable file."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _copy(source: IO[bytes], target: Path) -> str:
    """Write a stream to a file; return its sha256."""
    digest = hashlib.sha256()
    with target.open("wb") as stream:
        for piece in _read(source):
            digest.update(piece)
            stream.write(piece)
    return digest.hexdigest()


def _compress(source: IO[bytes], target: Path) -> None:
    """Write gzip whose bytes depend only on the content, so that a partial upload can resume."""
    with (
        replacing(target) as part,
        part.open("wb") as raw,
        gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as stream,
    ):
        for piece in _read(source):
            stream.write(piece)


def _read(source: IO[bytes]) -> Iterator[bytes]:
    while piece := source.read(1 << 20):
        yield piece


def _file(cache: Path, layer: str) -> Path:
    return cache / f"{layer.partition(':')[2]}.tar.gz"


def _common(ours: Sequence[str], theirs: Sequence[str]) -> int:
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count
