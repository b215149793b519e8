"""Keys of a config that name models and adapters: a folder here, a run's result, a name on a hub.

Read as LLaMA-Factory 0.9.3 does: hparams/model_args.py, hparams/finetuning_args.py,
train/trainer_utils.py (create_ref_model, create_reward_model), model/loader.py (which value head).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.basemodel import files as model_files
from tunesmith.basemodel import judge, kinds
from tunesmith.basemodel.kinds import Hashed, Kind
from tunesmith.core import documents
from tunesmith.core.documents import Arguments
from tunesmith.core.errors import UsageError
from tunesmith.job.merge.adapter import check_start
from tunesmith.job.run import config as run_config
from tunesmith.job.run.config import SEVERAL
from tunesmith.job.run.schema import Download, FileRecord, ManagedKey, Origin
from tunesmith.plan import model_check, results
from tunesmith.plan.config import Config
from tunesmith.plan.results import RunResult
from tunesmith.plan.target import Target
from tunesmith.project import Project

BASE = "model_name_or_path"
# What a config may name beside its base model, and the stages that read it.
_STAGES = {
    "adapter_name_or_path": None,
    "ref_model": ("ppo", "dpo", "kto"),
    "ref_model_adapters": ("ppo", "dpo", "kto"),
    "reward_model": ("ppo",),
    "reward_model_adapters": ("ppo",),
}
KEYS = (BASE, *_STAGES)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Named:
    """What one name of a key stands for: a folder here, a run's result, else a name on a hub."""

    key: str
    place: int
    written: str
    kind: Kind
    path: Path | None = None
    result: RunResult | None = None

    @property
    def name(self) -> str:
        """Where it lies below a run's inputs."""
        return f"{self.key}/{self.place}" if self.key in SEVERAL else self.key

    @property
    def download(self) -> Download | None:
        """What is to be fetched for it; the base model has a way of its own."""
        if self.key == BASE or self.path or self.result:
            return None
        return Download(self.key, self.written, self.kind, self.place)

    @property
    def origin(self) -> Origin:
        """What run.json says of it."""
        made = Origin(self.key, self.written, self.place)
        if self.result is None:
            return made
        found = self.result
        digest = kinds.digest(found.files) if found.files else None
        return Origin(
            self.key,
            self.written,
            self.place,
            run=found.run_id,
            result=found.folder,
            host=found.host,
            sha256=digest,
        )

    @property
    def told(self) -> bool:
        """Whether run.json has an origin of it: the base model has a record of its own."""
        return self.key != BASE or self.result is not None


def settle(
    project: Project,
    target: Target,
    config: Config,
    values: Arguments,
    passed: Collection[str] = (),
) -> tuple[tuple[Named, ...], list[ManagedKey]]:
    """Let `values` name folders of this machine by their absolute paths, in place.

    Returns what the model keys name, and the keys that a run's result was put into. What lies on
    the target already keeps its name here (plan/staging.py replaces it). Keys that are `passed`
    over hold the target's own paths. Raises UsageError for a name that is nothing, or that is of
    another kind than its key asks for.
    """
    _refuse_subfolder(project, config, values)
    found: list[Named] = []
    managed: list[ManagedKey] = []
    for key, kinds_of_key in _wanted(values):
        if key in passed:
            continue
        for place, (text, kind) in enumerate(kinds_of_key):
            named = _named(project, target, config, key, place, text, kind)
            if named is None:
                continue
            found.append(named)
            if named.path is not None:
                run_config.put_name(values, key, place, str(named.path))
            if named.result is not None:
                why = f"the {named.kind.replace('_', ' ')} of run {named.result.run_id}"
                value = str(named.path or f"{named.result.run_id}/{named.result.folder}")
                managed.append(ManagedKey(key, value, text, why))
    _check_bases(config, values, found)
    return tuple(found), managed


def known(named: Sequence[Named]) -> dict[Path, FileRecord]:
    """Return the seals of what lies on this machine, by path."""
    return {
        item.result.path / name: record
        for item in named
        if item.result and item.result.path
        for name, record in item.result.files.items()
    }


def refuse_changed(known: Mapping[Path, FileRecord], found: Mapping[Path, Hashed]) -> None:
    """Raise UsageError for a file of another run that is not the one its seal is of.

    `found` are files that were just read.
    """
    for path, record in found.items():
        sealed = known.get(path)
        if sealed is not None and sealed.sha256 != record.sha256:
            raise UsageError(
                f"{path}: changed since it was sealed: expected sha256 {sealed.sha256}, found "
                f"{record.sha256}",
                hint="put it back as it was, or make it anew with `inv merge` or `inv train`",
            )


def about(config: Config, named: Sequence[Named]) -> str:
    """Return what a training is of: its data, and the adapters that it starts from."""
    start = [item.written for item in named if item.key == "adapter_name_or_path"]
    return f"on {config.get('dataset')}" + (f" from {', '.join(start)}" if start else "")


def check_fit(values: documents.Config) -> None:
    """Raise UsageError where an adapter that a config starts from is of another base model.

    Base model and adapters are on this machine.
    """
    if adapters := run_config.starting_adapters(values):
        check_start(Path(str(values[BASE])), map(Path, adapters))


def _wanted(values: documents.Config) -> Iterator[tuple[str, list[tuple[str, Kind]]]]:
    """Yield each key that is read, with its names and what each must be."""
    stage = str(values.get("stage") or "sft")
    rewards = len(run_config.names_in(values.get("reward_model_adapters")))
    for key in KEYS:
        stages = _STAGES.get(key)
        if not values.get(key) or (stages is not None and stage not in stages):
            continue
        names = run_config.names_in(values[key]) if key in SEVERAL else [str(values[key])]
        kind: Kind = "adapter" if key in SEVERAL else "model"
        if key == "reward_model":
            reward = run_config.kind_of_reward(values)
            if reward == "api":
                continue
            kind = "reward_adapter" if reward == "lora" else "model" if rewards else "reward_model"
        wanted = [(name, kind) for name in names]
        if key == "reward_model_adapters":
            # model/loader.py: the value head is the last adapter's.
            wanted[-1] = (names[-1], "reward_adapter")
        yield key, wanted


def _named(
    project: Project,
    target: Target,
    config: Config,
    key: str,
    place: int,
    text: str,
    kind: Kind,
) -> Named | None:
    if text.startswith(results.PREFIX):
        run_id = text[len(results.PREFIX) :].strip()
        try:
            result = results.find(project, target, run_id, kind)
        except UsageError as error:
            said = f"{config.file}: `{key}` is {text}: {error.message}"
            raise UsageError(said, error.detail, hint=error.hint) from None
        if result.path is not None:
            _judge(config, key, text, result.path, kind)
        return _comma_free(config, Named(key, place, text, kind, result.path, result))
    if not text:
        raise _refused(config, key, repr(str(config.get(key))), "an empty name in it", kind)
    path = project.find(text)
    plain = text.startswith(("/", ".", "~")) or path.exists()
    if key == BASE and not plain:
        return None  # a name: the fetch of base models says what is wrong with it
    if not plain and "/" in text:
        # As in saves/sft, with a folder `saves` here.
        plain = project.find(text.partition("/")[0]).is_dir()
    if not plain:
        if _HUB_NAME.fullmatch(text):
            return Named(key, place, text, kind)
        raise _refused(config, key, text, "neither a folder here nor a hub's name", kind)
    if key == BASE and target.shared and not path.exists() and text.startswith("/"):
        return None  # a folder of the target's own, which its fetch phase proves
    _check(config, key, text, path, kind)
    return _comma_free(config, Named(key, place, text, kind, path))


def _comma_free(config: Config, named: Named) -> Named:
    if named.path is not None and "," in str(named.path) and named.key in SEVERAL:
        raise UsageError(
            f"{config.file}: `{named.key}` is {named.path}: LLaMA-Factory splits it at the comma",
            hint=f"in a folder without one: `ln -s {shlex.quote(str(named.path))} adapter`, then "
            f"write `{named.key}: ./adapter`",
        )
    return named


def _check(config: Config, key: str, text: str, path: Path, kind: Kind) -> None:
    """Raise UsageError unless a folder of this machine is one of a kind."""
    if not path.exists():
        raise _refused(config, key, text, "no such folder", kind)
    if path.suffix == ".gguf" and path.is_file():
        raise UsageError(
            f"{config.file}: `{key}` is {text}: a GGUF file, which is made for inference",
            hint="name what it was made from: a folder or a hub's name with .safetensors files",
        )
    if not path.is_dir():
        raise _refused(config, key, text, "a file, a folder expected", kind)
    names = {entry.name for entry in path.iterdir()}
    adapter, whole = kinds.ADAPTER_CONFIG in names, model_files.CONFIG in names
    if kind not in kinds.ADAPTERS and adapter and not whole:
        other = {BASE: "adapter_name_or_path"}.get(key, f"{key}_adapters")
        raise UsageError(
            f"{config.file}: `{key}` is {text}: an adapter, a whole model expected",
            hint=f"write `{other}: {text}`, and as `{key}` the model it was trained on",
        )
    if kind in kinds.ADAPTERS and whole and not adapter:
        other = BASE if key == "adapter_name_or_path" else key.removesuffix("_adapters")
        hint = f"write `{other}: {text}` and remove `{key}`"
        if key == "reward_model":
            hint = "write `reward_model_type: full`"
        raise UsageError(
            f"{config.file}: `{key}` is {text}: a whole model, an adapter expected", hint=hint
        )
    _judge(config, key, text, path, kind)
    if problems := kinds.verify(kind, path):
        raise _refused(config, key, text, str(problems[0]), kind)


def _judge(config: Config, key: str, text: str, path: Path, kind: Kind) -> None:
    """Raise UsageError for a folder with a model that nobody can train on, or load."""
    if kind in kinds.ADAPTERS:
        return
    code = bool(config.overrides.get("trust_remote_code"))
    try:
        judge.require_trainable(model_check.seen(text, path, code=code))
    except UsageError as error:
        raise UsageError(f"{config.file}: `{key}` is {error.message}", hint=error.hint) from None
    pickled = model_files.pickles(entry.name for entry in path.iterdir())
    if pickled and not model_files.weight_files(path):
        raise UsageError(
            f"{config.file}: `{key}` is {text}: only pickled weights are here ({pickled[0]}), "
            "which can run code when loaded",
            hint="name a copy with .safetensors files, as transformers' `save_pretrained` writes "
            "them",
        )


def _refused(config: Config, key: str, text: str, why: str, kind: Kind) -> UsageError:
    return UsageError(
        f"{config.file}: `{key}` is {text}: {why}",
        hint=f"name {kinds.NOUNS[kind]}: a folder, a hub's name (owner/name), or run:RUN_ID "
        "(`inv runs` lists them)",
    )


def _refuse_subfolder(project: Project, config: Config, values: documents.Config) -> None:
    """Refuse adapter_folder, which LLaMA-Factory would apply to the run's own result too."""
    inner = values.get("adapter_folder")
    names = run_config.names_in(config.get("adapter_name_or_path"))
    if inner and names:
        whole = ",".join(f"{name}/{inner}" for name in names)
        here = all(project.find(name).is_dir() for name in names)
        raise UsageError(
            f"{config.file}: `adapter_folder` is {inner}: it would be looked for in the run's own "
            "result too",
            hint=f"remove it and write `adapter_name_or_path: {whole}`"
            if here
            else f"remove it and name a copy of the folder {inner} as `adapter_name_or_path`",
        )


def _check_bases(config: Config, values: documents.Config, found: list[Named]) -> None:
    """Raise UsageError where a run's adapter is of another base model, or another template."""
    name = str(values.get(BASE))
    named_by_run = name.startswith(results.PREFIX)  # on a host: its path is not known yet
    for item in found:
        result = item.result
        if result is None:
            continue
        own = config.get("template")
        goes_on = item.key in (BASE, "adapter_name_or_path")
        insisted = values.get("stage") == "pt" or "template" in config.overrides
        if goes_on and not insisted and result.template not in (None, own):
            insist = f", or insist with `template={own}` on the command line" if own else ""
            raise UsageError(
                f"{config.file}: `template` is {own or 'missing'}, but run {result.run_id} was "
                f"trained with {result.template}",
                hint=f"write `template: {result.template}`{insist}",
            )
        if item.key in ("adapter_name_or_path", "reward_model") and item.kind in kinds.ADAPTERS:
            base = result.base.name
            if base not in (None, name) and result.base.path != name and not named_by_run:
                raise UsageError(
                    f"{config.file}: `{item.key}` is {item.written}, which was trained on {base}, "
                    f"and `{BASE}` is {name}",
                    hint=f"write `{BASE}: {base}`",
                )
