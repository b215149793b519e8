"""Checkpoints that can be trusted.

transformers 4.52 writes straight into checkpoint-N, without fsync and with
trainer_state.json last, and on resume takes the highest number without looking inside.
So a checkpoint counts here only when it was sealed: every file synced to disk, and a
manifest with size and sha256 written after them. What has no fitting manifest is set
aside under a name that neither the resume nor the rotation of transformers matches.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.documents import JsonObject
from tunesmith.core.files import fsync_folder, read_json, sha256_of, write_json

MANIFEST = "tunesmith-manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its folder, optimizer step and size in bytes."""

    path: Path
    step: int
    size: int


def folders(output: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint-N in `output`, oldest step first.

    Ordered by step, never by time: a clock that jumps must not make the newest
    checkpoint look old.
    """
    if not output.is_dir():
        return []
    found = [(int(m[1]), p) for p in output.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return sorted(found)


def seal(folder: Path) -> Checkpoint:
    """Sync every file of `folder` to disk and write the manifest that makes it count."""
    step = _step_of(folder)
    files: dict[str, JsonObject] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        files[str(file.relative_to(folder))] = {
            "size": file.stat().st_size,
            "sha256": sha256_of(file),
        }
    fsync_folder(folder)
    write_json(folder / MANIFEST, {"step": step, "files": files})
    fsync_folder(folder.parent)
    return Checkpoint(folder, step, sum(record["size"] for record in files.values()))


def fault_of(folder: Path) -> str | None:
    """Return in words why `folder` cannot be resumed from; None when it is whole."""
    try:
        manifest = read_json(folder / MANIFEST)
        step = int(manifest["step"])
        files = {str(n): (int(r["size"]), str(r["sha256"])) for n, r in manifest["files"].items()}
    except FileNotFoundError:
        return "it was never finished (no manifest)"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is damaged"
    try:
        return _difference(folder, step, files)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"it cannot be read ({error.strerror})"


def _difference(folder: Path, step: int, files: Mapping[str, tuple[int, str]]) -> str | None:
    """Return in words where `folder` differs from its manifest; None when it does not."""
    if step != _step_of(folder):
        return f"its manifest is of step {step}"
    for name, (size, sha256) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256_of(file) != sha256:
            return f"{name} was changed (sha256 differs)"
    return None


def newest_valid(output: Path) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    """Return the newest whole checkpoint and what was set aside, as (name, why).

    Faulty checkpoints newer than it are renamed to bad-checkpoint-N; older ones are
    not looked at.
    """
    discarded: list[tuple[str, str]] = []
    for step, folder in reversed(folders(output)):
        fault = fault_of(folder)
        if fault is None:
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            return Checkpoint(folder, step, size), discarded
        aside = output / f"bad-{folder.name}"
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        discarded.append((folder.name, fault))
    return None, discarded


def rotate(output: Path, keep: int, best: Path | None) -> list[Path]:
    """Delete the oldest sealed checkpoints beyond `keep`, and return them.

    `best` (load_best_model_at_end) always stays. The count is of steps, so that the
    newest is never the one to go, whatever the clock says.
    """
    sealed = [p for _, p in folders(output) if (p / MANIFEST).is_file()]
    spare = [p for p in sealed[: max(0, len(sealed) - keep)] if best is None or p != best]
    for folder in spare:
        # The manifest goes first: a half-deleted checkpoint must not look whole.
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
    return spare


def _step_of(folder: Path) -> int:
    match = _NAME.match(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named checkpoint-N")
    return int(match[1])
