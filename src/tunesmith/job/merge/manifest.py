"""MANIFEST.json in a merged model: what it was made of, and size and sha256 of each file.

It goes where the model goes, so that a copy can be checked without the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.files import locked, read_json, sha256_of, write_json
from tunesmith.job.run.folder import MANIFEST


def write(
    folder: Path, made_of: Mapping[str, Any], hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Hash every file of `folder` but those whose sha256 is in `hashes`; write its manifest."""
    manifest = {"format": 1, **made_of, "files": listing(folder, hashes)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def note(folder: Path, key: str, value: Any) -> None:
    """Add one fact to a manifest; files and hashes stay."""
    with locked(folder / MANIFEST):
        write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), key: value})


def listing(folder: Path, hashes: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Return size (bytes) and sha256 of each file but the manifest itself."""
    known = hashes or {}
    return {
        file.name: {"size": file.stat().st_size, "sha256": known.get(file.name) or sha256_of(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }


def faults(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return where `found` (a listing) is not what the manifest says."""
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST}: missing"]
    listed: dict[str, dict[str, Any]] = read_json(folder / MANIFEST)["files"]
    wrong = [f"{name}: missing, {MANIFEST} names it" for name in sorted(listed.keys() - found)]
    wrong += [f"{name}: not named in {MANIFEST}" for name in sorted(found.keys() - listed.keys())]
    for name in sorted(listed.keys() & found.keys()):
        for key in ("size", "sha256"):
            if listed[name][key] != found[name][key]:
                wrong.append(f"{name}: {key} {found[name][key]}, {listed[name][key]} when merged")
                break
    return wrong
