"""What a run reads, recorded when it is made, and compared before each phase that reads it.

run.json's `inputs` has, for the training and for a prediction apart, the entries of
dataset_info.json and size and sha256 of every file: rows, media, adapters to start from, further
configs; `model.files` has those of the base model. A comparison is cheap: a file whose size,
time stamps and inode are those it had when its sha256 was last seen (RUN/.stamps.json, which stays
on this machine) is not read again. Standard library only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.basemodel import kinds
from tunesmith.basemodel.store import ModelFolder
from tunesmith.core.callbacks import OnBytes
from tunesmith.core.errors import UsageError
from tunesmith.core.files import read_json, write_json
from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.job.run.config import other_adapters, other_models, starting_adapters
from tunesmith.job.run.remedies import new_run
from tunesmith.job.run.schema import (
    Download,
    FileRecord,
    InputRecord,
    ModelRef,
    RunInputs,
    RunRequest,
    Values,
)
from tunesmith.job.run.seals import ENVIRONMENT, rewriting, sha256_of, unheard

# The parts of run.json's `inputs`, and what they are inputs of.
TRAIN, PREDICT = "train", "predict"
STAMPS = ".stamps.json"
# Keys that name a JSON file, or hold what stands in one.
JSON_KEYS = ("deepspeed", "fsdp_config", "accelerator_config")
_REGISTRY = "dataset_info.json"
_MEDIA = ("images", "videos", "audios")
# Rows lie beside media where media_dir is not given.
_ROWS = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")
_NO_FOLDERS = ("ONLINE", "REMOTE:")

Record = FileRecord | InputRecord
# By what a file is known that had a sha256: size, mtime, inode, ctime, sha256.
Stamp = list[int | str]


def recorded(
    request: RunRequest, config: Values | None, known: Mapping[Path, FileRecord] | None = None
) -> RunRequest:
    """Return run.json with the `inputs` it lacks: of `config`'s training, of its prediction.

    `known` are records (size, sha256) of files that were just hashed. Files are read here, about
    1 GB a second.
    """
    values = {TRAIN: config or {}, PREDICT: request.predict or {}}
    added = {n: _described(values[n], known or {}) for n in lacking(request, config)}
    return replace(request, inputs={**request.inputs, **added})


def with_files(request: RunRequest, item: Download, model: ModelFolder) -> RunRequest:
    """Return run.json with the files of a model that was just fetched among its inputs."""
    own = item.key == "adapter_name_or_path"
    files = {
        str(model.path / name): InputRecord(record.size, record.sha256, own)
        for name, record in model.files.items()
    }
    made = {
        part: replace(found, files=dict(sorted({**found.files, **files}.items())))
        for part, found in request.inputs.items()
    }
    return replace(request, inputs=made)


def lacking(request: RunRequest, config: Values | None) -> list[str]:
    """Return the parts of run.json's `inputs` that `recorded` would add."""
    wanted = {TRAIN: config, PREDICT: request.predict}
    return [n for n, v in wanted.items() if v is not None and n not in request.inputs]


def remember(
    run_dir: Path,
    request: RunRequest,
    parts: Collection[str],
    apart: Collection[Path] = (),
) -> None:
    """Remember how the files of `parts` that were just hashed lie here, so that the next look
    at them is cheap; all but those `apart`, which were hashed earlier."""
    files = {n: r for name in parts for n, r in request.inputs[name].files.items()}
    fresh = {Path(name): record for name, record in files.items() if Path(name) not in apart}
    _remember(run_dir, {str(path): _stamp(path, record) for path, record in fresh.items()})


def remember_model(run_dir: Path, model: ModelRef | None) -> None:
    """The same of a base model that was just fetched or found whole."""
    _remember(run_dir, {str(p): _stamp(p, record) for p, record in _model(model).items()})


def check_data(run_dir: Path, request: RunRequest, of: str, tell: OnBytes = unheard) -> bool:
    """Compare rows, entries, adapters and further files with the record of TRAIN or PREDICT.

    Returns False where there is no record: the run was made by an older version. Raises
    UsageError naming the first file that was changed, is gone, or was added to a folder of data.
    """
    values = request.inputs.get(of)
    if values is None:
        return False
    for key, entry in values.entries.items():
        found = _entry(Path(values.registry), key)
        if found != entry:
            raise _changed(
                run_dir, f"{values.registry}: entry {key}", f"expected {entry}, found {found}"
            )
    for folder in values.folders:
        names = {str(path) for path in _below(Path(folder))}
        added = sorted(names - values.files.keys())
        if added:
            raise _changed(run_dir, added[0], "it was not there")
    _compare(run_dir, {Path(name): r for name, r in values.files.items()}, tell)
    return True


def check_adapters(
    run_dir: Path, request: RunRequest, folders: Collection[str], tell: OnBytes = unheard
) -> None:
    """Compare those of the adapters that the training began from that lie in `folders`.

    Raises UsageError for a change.
    """
    values = request.inputs.get(TRAIN)
    found = values.files if values else {}
    files = {Path(name): record for name, record in found.items() if record.adapter}
    _compare(run_dir, {p: r for p, r in files.items() if str(p.parent) in folders}, tell)


def check_model(
    run_dir: Path, request: RunRequest, tell: OnBytes = unheard, *, unseen: bool = True
) -> None:
    """Compare the base model with run.json's record of it. Raises UsageError for a change.

    Without `unseen`, files whose sha256 was never seen here are left to the phase, which reads
    all of them and compares.
    """
    name = request.model.name if request.model else None
    mend = f"`inv model.fetch {name}` mends one that was fetched"
    seen = _stamps(run_dir).keys()
    files = {p: r for p, r in _model(request.model).items() if unseen or str(p) in seen}
    _compare(run_dir, files, tell, mend)


def check_stack(run_dir: Path, phase: str) -> None:
    """Raise UsageError when this environment is of another lock than the run began in.

    The first phase of a training records it.
    """
    try:
        made = read_json(Path(sys.prefix) / ENVIRONMENT_MARKER)
        found = {key: str(made[key]) for key in ("flavour", "lock_sha256")}
    except (OSError, ValueError, KeyError, TypeError):
        return  # not an environment of ours: nothing says what it is made of
    if not (run_dir / ENVIRONMENT).is_file():
        with rewriting(run_dir, phase, ENVIRONMENT):
            write_json(run_dir / ENVIRONMENT, found)
    began = read_json(run_dir / ENVIRONMENT)
    if found != began:
        raise UsageError(
            f"stack: {sys.prefix} is now of lock {found['flavour']} with sha256 "
            f"{found['lock_sha256']}, run {run_dir.name} began with {began['flavour']} of "
            f"sha256 {began['lock_sha256']}; bring that environment back, or begin a new run: "
            f"{new_run(run_dir)}"
        )


def names_of(config: Values) -> list[str]:
    """Return the data sets that a config names."""
    found: list[str] = []
    for key in ("dataset", "eval_dataset"):
        value = config.get(key) or ()
        found += value.split(",") if isinstance(value, str) else map(str, value)
    return list(dict.fromkeys(name.strip() for name in found if name.strip()))


def _described(config: Values, known: Mapping[Path, FileRecord]) -> RunInputs:
    """Return what a config's inputs are."""
    data = Path(str(config.get("dataset_dir") or "data"))
    here = not str(data).startswith(_NO_FOLDERS) and (data / _REGISTRY).is_file()
    entries = {name: _entry(data / _REGISTRY, name) for name in names_of(config)} if here else {}
    # Those of a folder of data are read, whatever they are called.
    folders: list[Path] = []
    files: list[Path] = []
    for entry in entries.values():
        for key in ("file_name", "script_url"):
            place = data / str((entry or {}).get(key) or "")
            if (entry or {}).get(key) and place.is_dir():
                folders.append(place)
            elif (entry or {}).get(key):
                files.append(place)
    tokenized = Path(str(config.get("tokenized_path") or ""))
    if config.get("tokenized_path") and tokenized.is_dir():
        folders.append(tokenized)
    files += [path for folder in folders for path in _below(folder)]
    files += _media(config, data, entries)
    for key in JSON_KEYS:
        if isinstance(config.get(key), str) and not str(config[key]).startswith("{"):
            files.append(Path(str(config[key])))
    files += [path for name in other_adapters(config) for path in _adapter(config, Path(name))]
    files += [path for name in other_models(config) for path in _weights(Path(name))]
    adapters = [path for name in starting_adapters(config) for path in _adapter(config, Path(name))]
    there = [path for path in dict.fromkeys([*files, *adapters]) if path.is_file()]
    records = {
        str(path): InputRecord(known[path].size, known[path].sha256)
        for path in there
        if path in known
    }
    unread = {str(path): path for path in there if path not in known}
    for name, digest in sha256_of(unread, unheard):
        records[name] = InputRecord(unread[name].stat().st_size, digest)
    for path in adapters:
        records[str(path)] = replace(records[str(path)], adapter=True)
    return RunInputs(
        registry=str(data / _REGISTRY),
        entries=entries,
        folders=tuple(str(folder) for folder in folders),
        files=dict(sorted(records.items())),
    )


def _entry(registry: Path, key: str) -> Values | None:
    try:
        found: Values | None = read_json(registry).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return found


def _media(config: Values, data: Path, entries: Values) -> Iterator[Path]:
    """Yield the files that rows with media may name."""
    columns = [(entry or {}).get("columns") or {} for entry in entries.values()]
    if not any(found.get(kind) for found in columns for kind in _MEDIA):
        return
    own = config.get("media_dir")
    for path in _below(Path(str(own)) if own else data):
        if own or path.suffix not in _ROWS:
            yield path


def _adapter(config: Values, folder: Path) -> Iterator[Path]:
    """Yield the files of an adapter, without checkpoints and model card; none of the run's own
    output, whose files have seals."""
    place = config.get("output_dir")
    own = Path(str(place)).with_name("output").resolve() if place else None
    if folder.is_dir() and folder.resolve() != own:
        yield from (p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "README.md")


def _weights(folder: Path) -> Iterator[Path]:
    """Yield the files of a model that is read beside the base model."""
    if folder.is_dir():
        names = [path.name for path in folder.iterdir() if path.is_file()]
        yield from (folder / name for name in kinds.choose("reward_model", names))


def _below(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from _below(path)
            elif path.is_file():
                yield path


def _model(model: ModelRef | None) -> dict[Path, FileRecord]:
    if model is None or not model.path:
        return {}
    return {Path(model.path) / name: record for name, record in model.files.items()}


def _compare(
    run_dir: Path,
    files: Mapping[Path, FileRecord] | Mapping[Path, InputRecord],
    tell: OnBytes,
    mend: str | None = None,
) -> None:
    stamps = _stamps(run_dir)
    fresh: dict[str, Path] = {}
    for path, record in files.items():
        try:
            size = path.stat().st_size
        except OSError as error:
            why = f"{error.strerror}, expected sha256 {record.sha256}"
            raise _changed(run_dir, str(path), why, mend) from None
        if size != record.size:
            why = f"expected {record.size} bytes with sha256 {record.sha256}, found {size}"
            raise _changed(run_dir, str(path), why, mend)
        if stamps.get(str(path)) != _stamp(path, record):
            fresh[str(path)] = path
    # Taken before the file is read: a change meanwhile is found the next time.
    new = {name: _stamp(path, files[path]) for name, path in fresh.items()}
    for name, digest in sha256_of(fresh, tell):
        expected = files[fresh[name]].sha256
        if digest != expected:
            why = f"expected sha256 {expected}, found {digest}"
            raise _changed(run_dir, name, why, mend)
    if new:
        _remember(run_dir, new)


def _changed(run_dir: Path, name: str, what: str, mend: str | None = None) -> UsageError:
    put = "put it back as it was" + (f" ({mend})" if mend else "")
    return UsageError(
        f"{name}: changed since run {run_dir.name} was made: {what}; {put}, or begin a new run: "
        f"{new_run(run_dir)}"
    )


def _stamp(path: Path, record: Record) -> Stamp | None:
    """Return by what a file is known that had a sha256; ctime cannot be set by who changes it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [
        found.st_size,
        found.st_mtime_ns,
        found.st_ino,
        found.st_ctime_ns,
        record.sha256,
    ]


def _stamps(run_dir: Path) -> dict[str, Stamp]:
    try:
        known = read_json(run_dir / STAMPS)
    except (OSError, ValueError):
        return {}  # it only saves time: without it files are read again
    return known if isinstance(known, dict) else {}


def _remember(run_dir: Path, stamps: Mapping[str, Stamp | None]) -> None:
    # A run folder that is mounted to be read, a full disk: the next look reads the files again.
    if stamps:
        with contextlib.suppress(OSError):
            write_json(run_dir / STAMPS, dict(sorted({**_stamps(run_dir), **stamps}.items())))
