"""The base model a verb needs, fetched and shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.download import OnProgress
from tunesmith.basemodel.fetch import Judge, ModelFolder, Progress
from tunesmith.basemodel.files import tensor_shapes
from tunesmith.basemodel.judge import Seen, require_trainable
from tunesmith.basemodel.judge import judge as judge_model
from tunesmith.cli.console import console, say
from tunesmith.core import formats
from tunesmith.core.progress import FIRST_SECONDS, LINE_SECONDS, Display
from tunesmith.plan import build, models, parser
from tunesmith.plan.model_check import this_machine, wish_of
from tunesmith.plan.plan import Plan
from tunesmith.project import Project
from tunesmith.targets.services import lacks_environment


def fetch_base_model(
    project: Project,
    name: str,
    mirror: str,
    revision: str | None,
    *,
    code: bool = False,
    judge: Judge = require_trainable,
) -> ModelFolder:
    with fetching() as show:
        model = build.fetch_model(
            project, name, show, mirror=mirror, revision=revision, remote_code=code, judge=judge
        )
    say_base_model(model)
    return model


def with_base_model(project: Project, plan: Plan, mirror: str, revision: str | None = None) -> Plan:
    """Return a plan with its base model and what else it names on hubs, fetched if need be.

    Before a download LLaMA-Factory's parser is asked about the config: it may refuse it. Raises
    UsageError for an adapter of another base model too, and for a run's result that is not the
    one that was sealed.
    """
    name = str(plan.request.needed_model().name)
    if not model_store.is_here(project.models, name, revision):
        asked = parser.ask_planned(project, plan)
        if asked is None:
            raise lacks_environment(project.environment())
    overrides = plan.request.overrides
    values = plan.request.predict if plan.config is None else plan.config
    merge = "merge" in plan.phases
    # A preset tries by itself how many rows fit.
    before = {item.key: item.was for item in plan.managed} if plan.request.preset == "fast" else {}
    insisted = {*overrides, *(["template"] if name in project.base_models else [])}
    machine = this_machine()
    if chosen := plan.request.gpus:
        machine = machine.taking(chosen.count, chosen.ids)
    wish = wish_of(values or {}, insisted, merge=merge, machine=machine, before_preset=before)

    def judge(seen: Seen) -> None:
        for note in judge_model(seen, wish).notes:
            say(note)

    code = bool(overrides.get("trust_remote_code"))
    model = fetch_base_model(project, name, mirror, revision, code=code, judge=judge)
    models.refuse_changed(plan.known, {model.path / n: r for n, r in model.files.items()})
    for item in plan.downloads:
        with fetching() as show:
            other = build.fetch_model(
                project, item.name, show, mirror=mirror, remote_code=code, kind=item.kind
            )
        say_base_model(other, item.key)
        plan = plan.with_download(item, other)
    plan = plan.with_model(model, tensor_shapes(model.path))
    models.check_fit(plan.config or plan.request.predict or {})
    return plan


def say_base_model(model: ModelFolder, what: str = "base model") -> None:
    size = formats.size(sum(record.size for record in model.files.values()))
    how = "fetched and verified" if model.fetched else "verified before, unchanged"
    say(f"{what}: {model.name} from {model.source} ({size}, {how})")
    say(f"  {model.path}")


@contextlib.contextmanager
def fetching() -> Iterator[OnProgress]:
    """Yield a callback that shows what a fetch does: lines that stay, and how far it is."""
    with Display(console) as display:
        row = display.row("  base model", first=LINE_SECONDS)

        def show(progress: Progress) -> None:
            label = f"  {progress.text}"
            if progress.total is None:
                display.say(label)
            if progress.what != "note" and label != row.label:
                row.doing(label, LINE_SECONDS if progress.total is None else FIRST_SECONDS)
            if progress.total:
                row.moved(progress.done, progress.total)

        yield show


def sources(project: Project, name: str, mirror: str) -> str:
    """Return the kinds of sources of a base model, and the hub's address."""
    profile = project.mirror(mirror)
    known = project.base_models.get(name)
    sources = ", ".join(known.sources) if known else "hub"
    return f"{sources} ({profile.hf_endpoints[0]})"


def base_model_location(project: Project, name: str, mirror: str) -> str:
    """Return where a base model lies here, or would be fetched from."""
    stored = [entry.model.path for entry in model_store.entries(project.models, name)]
    if there := next((path for path in stored if path.is_dir()), None):
        return f"{name} in {there}"
    return f"{name}, fetched from {sources(project, name, mirror)}"
