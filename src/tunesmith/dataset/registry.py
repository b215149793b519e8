"""dataset_info.json: look data sets up, check them, register new ones.

`dataset_dir` is LLaMA-Factory's: a folder with dataset_info.json, or ONLINE (names are
hub ids), or REMOTE:repo (the registry lies on the hub).
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from dataclasses import replace as altered
from pathlib import Path
from typing import Any

from tunesmith.core.bounded import TooDeepError, kind_fault, parse_json, read_text
from tunesmith.core.callbacks import OnBytes
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.core.files import locked, write_text
from tunesmith.dataset.check import check_file, unchecked
from tunesmith.dataset.detect import detect
from tunesmith.dataset.entry import FORMATTINGS, Entry, entry_from_raw
from tunesmith.dataset.media import MediaPlace
from tunesmith.dataset.reading import TYPES, Reader, Tables, values_of
from tunesmith.dataset.report import DatasetReport

REGISTRY = "dataset_info.json"


def load_registry(dataset_dir: Path) -> dict[str, Entry]:
    """Read all entries. Raises UsageError naming the file and, for a bad entry, its key."""
    path = dataset_dir / REGISTRY
    try:
        text = read_text(path)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}",
            hint=f"register a data set with `inv data.register --file {dataset_dir}/FILE.json "
            "--key KEY`",
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 at byte {error.start}", hint="save it as UTF-8"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{path}: {error}", hint="check that it is the registry of data sets"
        ) from None
    return {key: entry_from_raw(key, raw, path) for key, raw in _parse(text, path).items()}


def resolve(dataset_dir: Path, names: str) -> tuple[Entry, ...]:
    """Return the entries of a comma-separated list, as in the config key `dataset`.

    Raises UsageError for a name that is not registered.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UsageError("no data set is named", hint="write `dataset: KEY` in the config")
    if str(dataset_dir) == "ONLINE":
        return tuple(Entry(key=name, other={"hf_hub_url": name}) for name in wanted)
    if str(dataset_dir).startswith("REMOTE:"):
        repo = str(dataset_dir).removeprefix("REMOTE:")
        return tuple(Entry(key=name, other={"hf_hub_url": f"{name} of {repo}"}) for name in wanted)
    registry = load_registry(dataset_dir)
    for name in wanted:
        if name not in registry:
            near = difflib.get_close_matches(name, registry, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            file = shlex.quote(f"{dataset_dir}/{name}.json")
            raise UsageError(
                f"data set {name} is not registered in {dataset_dir / REGISTRY}",
                detail=[f"registered: {', '.join(registry) or 'none'}"],
                hint=f"{meant}register it with "
                f"`inv data.register --file {file} --key {shlex.quote(name)}`",
            )
    return tuple(registry[name] for name in wanted)


def check_registered(
    dataset_dir: Path,
    names: str,
    stage: str | None = None,
    *,
    tables: Tables | None = None,
    thorough: bool = False,
    media: MediaPlace | None = None,
    progress: OnBytes | None = None,
) -> tuple[DatasetReport, ...]:
    """Check each data set of a comma-separated list; see `check_file` for the options.

    Media are looked up in `dataset_dir`, unless `media` says otherwise.

    One that lies on a hub, in a cloud or behind a script is reported with a note.
    Raises UsageError for a name that is not registered; faults of rows are in the reports.
    """
    reports = []
    for entry in resolve(dataset_dir, names):
        if entry.remote:
            reports.append(unchecked(entry, entry.remote, "not on this machine: not checked"))
        else:
            path = entry.path(dataset_dir)
            reports.append(
                check_file(
                    path,
                    entry,
                    stage,
                    tables=tables,
                    thorough=thorough,
                    media=media or MediaPlace(dataset_dir),
                    progress=progress,
                )
            )
    return tuple(reports)


def check_unregistered(
    file: Path,
    formatting: str | None = None,
    *,
    tables: Tables | None = None,
    thorough: bool = False,
    progress: OnBytes | None = None,
) -> DatasetReport:
    """Check a file or folder that no entry names, as `register` would describe it."""
    entry = detect(values_of(Reader(file, tables).pieces()), file.stem, file.name, formatting)
    report = check_file(file, entry, tables=tables, thorough=thorough, progress=progress)
    return altered(report, key=None)


def register(
    dataset_dir: Path,
    key: str,
    file: Path,
    formatting: str | None = None,
    replace: bool = False,
    tables: Tables | None = None,
) -> tuple[Entry, DatasetReport]:
    """Add a file or folder to the registry under `key`, with the columns it has.

    Returns the entry and what the check found. `formatting` (alpaca or sharegpt) is detected when
    None. The same key for the same file changes nothing, unless `replace` asks to read its columns
    again. Raises UsageError, with
    nothing written, for a file with faults and for a key that names another file.
    """
    check_key(key)
    if not dataset_dir.is_dir():
        raise UsageError(
            f"--dataset-dir {dataset_dir}: no such folder",
            hint=f"create it with `mkdir -p {shlex.quote(str(dataset_dir))}`",
        )
    if formatting not in (None, *FORMATTINGS):
        raise UsageError(
            f"formatting {formatting} is unknown", hint=f"use {' or '.join(FORMATTINGS)}"
        )
    if file.exists() and not file.is_dir() and (fault := kind_fault(file)):
        raise UsageError(f"{file}: {fault}, not a file: only files and folders can be registered")
    if file.is_file() and file.suffix not in TYPES:
        raise UsageError(f"{file}: only {', '.join(TYPES)} files can be registered")
    folder, path = dataset_dir.resolve(), file.parent.resolve() / file.name

    def registered() -> Entry | None:
        """Return what the key stands for, unless it is to be replaced; refuse another file."""
        known = load_registry(dataset_dir) if (dataset_dir / REGISTRY).exists() else {}
        there = None if replace else known.get(key)
        if there and (there.remote or there.path(folder).resolve() != path.resolve()):
            raise UsageError(
                f"key {key} is already registered for {there.remote or there.file_name}, "
                f"not for {file}",
                hint="choose another --key, or add --replace",
            )
        return there

    if there := registered():
        report = check_file(file, there, tables=tables, media=MediaPlace(dataset_dir))
        report.raise_if_bad()
        return there, report
    entry = detect(
        values_of(Reader(file, tables).pieces()), key, _name_in(folder, path), formatting
    )
    report = check_file(file, entry, tables=tables, media=MediaPlace(dataset_dir))
    if report.rows is None:
        raise UsageError(
            f"{file}: {report.findings[0].message}",
            hint="install the training environment with `inv stack.install`",
        )
    report.raise_if_bad()
    with locked(dataset_dir / REGISTRY):
        # Another command may have taken the key while the file was read.
        if there := registered():
            return there, report
        _write(dataset_dir / REGISTRY, {key: entry.to_raw()})
    return entry, report


def check_key(key: str) -> None:
    """Raise UsageError for a key that a config's `dataset` cannot name."""
    if not key or key != key.strip() or "," in key:
        raise UsageError(
            f"the key {key!r} is empty, has a comma or ends in a space", hint="choose another --key"
        )


def write_entries(dataset_dir: Path, entries: dict[str, Entry]) -> None:
    """Put entries into the registry at once; the others and the file's style stay."""
    with locked(dataset_dir / REGISTRY):
        _write(dataset_dir / REGISTRY, {key: entry.to_raw() for key, entry in entries.items()})


def _name_in(folder: Path, path: Path) -> str:
    """Return the file_name of a path: relative to the registry's folder if it lies there."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _write(path: Path, added: dict[str, JsonObject]) -> None:
    """Put entries in; keep the others, their order, and the way the file is written."""
    text = path.read_bytes().decode("utf-8") if path.exists() else "{}\n"
    entries = _parse(text, path)
    entries.update(added)
    indent = re.search(r"\n([ \t]+)\"", text)
    written = json.dumps(
        entries,
        # Non-ASCII names stay as people wrote them: plain, or escaped throughout.
        ensure_ascii=text.isascii() and "\\u" in text,
        indent=indent.group(1) if indent else 2,
    )
    ending = text[len(text.rstrip()) :]
    if "\r\n" in text:
        written = written.replace("\n", "\r\n")
    write_text(path, written + ending)


def _parse(text: str, path: Path) -> JsonObject:
    def once(pairs: list[tuple[str, Any]]) -> JsonObject:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = next(k for k in value if [key for key, _ in pairs].count(k) > 1)
            raise UsageError(
                f'{path}: the key "{twice}" occurs twice', hint="delete one of the two"
            )
        return value

    try:
        value = parse_json(text, object_pairs_hook=once)
    except TooDeepError as error:
        raise UsageError(f"{path}: {error}", hint="correct the file") from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="correct that line",
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f'{path}: the top level must be an object {{"KEY": {{...}}}}')
    return value
