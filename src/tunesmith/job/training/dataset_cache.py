"""Prepared rows are found again by the content of their files, not by path.

The datasets library caches LLaMA-Factory's prepared rows under a fingerprint of template,
tokenizer and settings, and identifies a file by path and modification time. That is too little: a
file changed under the same time (unpacked, synchronised) would be missed. And too much: on a host
each run has its own paths. So a run reads its data through a folder named by the content.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from tunesmith.core.documents import Config
from tunesmith.core.files import read_json, sha256_of, write_json
from tunesmith.core.patching import install
from tunesmith.job.patches import datasets, llamafactory, tokenizing, transformers
from tunesmith.job.patches.datasets import READ_AS_FILES

REGISTRY = "dataset_info.json"
# Our modules that affect prepared rows.
_OURS = (tokenizing, datasets, llamafactory, transformers)
# Packages whose code prepares the rows; a fingerprint contains only their names.
_MAKERS = ("llamafactory", "transformers", "tokenizers", "datasets")
# Values of `columns` that name media files, found through dataset_dir.
_MEDIA = ("images", "videos", "audios")


def by_content(config: Config) -> str | None:
    """Return a dataset_dir with links to the config's data, named by its content.

    None if that is impossible: data that is not a local file (the files of a folder would change
    their order), has media, is streamed, or is stored by `tokenized_path`. Hashes the files, about
    1 GB per second.
    """
    if config.get("tokenized_path") or config.get("streaming"):
        return None
    folder = Path(str(config.get("dataset_dir") or "data"))
    registry = folder / REGISTRY
    if not registry.is_file():
        return None
    registered = read_json(registry)
    entries = {name: registered.get(name) for name in _names(config)}
    if not entries or not all(_plain(folder, entry) for entry in entries.values()):
        return None
    names = sorted({str(entry["file_name"]) for entry in entries.values()})
    content = {name: sha256_of(folder / name) for name in names}
    made_by = {name: importlib.metadata.version(name) for name in _MAKERS}
    # Rows prepared by an earlier version of our code are not reused.
    ours = [sha256_of(Path(str(module.__file__))) for module in _OURS]
    identity = json.dumps([made_by, ours, entries, content], sort_keys=True)
    view = _views() / hashlib.sha256(identity.encode()).hexdigest()[:32]
    for name in names:
        _link((folder / name).resolve(), view / name)
    write_json(view / REGISTRY, entries)
    return str(view)


def _names(config: Config) -> list[str]:
    names: list[str] = []
    for key in ("dataset", "eval_dataset"):
        value = config.get(key) or ()
        names += value.split(",") if isinstance(value, str) else map(str, value)
    return list(dict.fromkeys(name.strip() for name in names))


def _plain(folder: Path, entry: Any) -> bool:
    """Whether an entry of the registry is just a file of rows below its folder."""
    if not isinstance(entry, dict) or any(key.endswith("_url") for key in entry):
        return False
    name = entry.get("file_name")
    if not isinstance(name, str) or "cloud_file_name" in entry:
        return False
    if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_file():
        return False
    return not any(entry.get("columns", {}).get(kind) for kind in _MEDIA)


def _views() -> Path:
    return _cache() / "tunesmith"


def _cache() -> Path:
    """Return the cache folder of the datasets library, by the rules of datasets 3.6."""
    if own := os.environ.get("HF_DATASETS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "datasets"


def _link(source: Path, link: Path) -> None:
    """Let `link` point to `source`; another process may be doing the same."""
    link.parent.mkdir(parents=True, exist_ok=True)
    part = link.with_name(f".{link.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(source)
    part.replace(link)


def hasten(config: Config) -> None:
    """Make the libraries prepare rows faster, with the same result. Imports them."""
    tokenizing.hasten()
    if Path(str(config.get("dataset_dir"))).parent == _views():
        for patch in READ_AS_FILES:
            install(patch)
