"""RUN/around: all of the merged model but its weights, to merge where LLaMA-Factory is not.

`python -m tunesmith.job.kit --run RUN` makes it, with LLaMA-Factory and without reading the base
model's weights; a pull brings it with the adapter. A merge that finds one made for just this
merge takes it instead of asking LLaMA-Factory again. Files that equal one of the adapter's folder
or of the base model are only named: they are there already, or come anyway.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.files import read_json, sha256_of, write_json
from tunesmith.job import around
from tunesmith.job.stream import Shard
from tunesmith.modelfiles import INDEX

FOLDER = "around"
RECORD = "kit.json"
LOG = "around.log"
_PART = ".around.part"
_LOCK = ".around.lock"
# Where a file of the merged model lies: in the kit, with the adapter, with the base model.
_HERE, _ADAPTER, _BASE = "around", "adapter", "base"


@dataclass(frozen=True)
class Kit:
    """A kit that fits; it answers what the process of job/around.py would be asked."""

    folder: Path
    part: Path  # where the merged model is put together
    places: Mapping[str, Path]
    record: Mapping[str, Any]

    def files(self) -> list[Shard]:
        """Return the weights files of the export."""
        return around.shards_of(self.record["shards"])

    def prompts(self) -> dict[str, Any]:
        """Put everything around the weights in its place; return parity.json's content."""
        for name, known in self.record["files"].items():
            source = self.places[known["in"]] / name
            if not source.is_file() or sha256_of(source) != known["sha256"]:
                raise TunesmithError(
                    f"{source}: not the file {RECORD} names: delete {self.folder}, and pull or "
                    "merge again"
                )
            shutil.copyfile(source, self.part / name)
        return dict(self.record["prompts"])


def key_of(request: Mapping[str, Any], config: Mapping[str, Any], keys: Mapping[str, Any]) -> str:
    """Return what a kit belongs to: the run's config and base model, and how it is merged.

    Paths are left out: they differ between machines.
    """
    plain = {k: v for k, v in config.items() if not (isinstance(v, str) and v.startswith("/"))}
    for name in ("model_name_or_path", "output_dir"):
        plain.pop(name, None)
    model = request.get("model", {})
    told = {"config": plain, "keys": dict(keys), "base": model.get("files", {})}
    told["run"] = request.get("run_id")
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def find(run_dir: Path, part: Path, base: Path, output: Path, key: str) -> Kit | None:
    """Return the run's kit if it was made for `key`."""
    folder = run_dir / FOLDER
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    if record["key"] != key:
        return None
    return Kit(folder, part, {_HERE: folder, _ADAPTER: output, _BASE: base}, record)


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Wait for another maker of the run's kit: that of a client whose line was cut works on."""
    with (run_dir / _LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(
    run_dir: Path,
    config: Mapping[str, Any],
    keys: Mapping[str, Any],
    key: str,
    base: Path,
    output: Path,
) -> dict[str, Any]:
    """Make RUN/around, whole or not at all; return its record."""
    part = run_dir / _PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with (
            (run_dir / LOG).open("wb") as log,
            around.begin(run_dir, part, config, keys, log) as other,
        ):
            shards, prompts = other.files(), other.prompts()
        files: dict[str, Any] = {}
        for file in sorted(part.iterdir()):
            digest = sha256_of(file)
            places = ((_ADAPTER, output), (_BASE, base))
            twin = next((w for w, f in places if _same(f / file.name, file, digest)), None)
            files[file.name] = {"in": twin or _HERE, "sha256": digest}
            if twin:
                file.unlink()
        record = {
            "key": key,
            "shards": around.told_of(shards),
            "prompts": prompts,
            "files": files,
        }
        write_json(part / RECORD, record)
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
        part.rename(run_dir / FOLDER)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return record


def _same(twin: Path, file: Path, digest: str) -> bool:
    if file.name == INDEX or not twin.is_file() or twin.stat().st_size != file.stat().st_size:
        return False
    return sha256_of(twin) == digest


def main(argv: Sequence[str] | None = None) -> int:
    """Make the kit of a run; its log is RUN/around.log."""
    from tunesmith.job import merge

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(prog="tunesmith.job.kit", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    try:
        merge.keep_kit(parser.parse_args(argv).run)
    except TunesmithError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
