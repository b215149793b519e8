"""The base model a verb needs, fetched and shown."""

from __future__ import annotations

import time
from collections.abc import Callable

from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.fetch import Judge, ModelFolder, Progress
from tunesmith.basemodel.files import tensor_shapes
from tunesmith.basemodel.judge import Seen, require_trainable
from tunesmith.basemodel.judge import judge as judge_model
from tunesmith.cli.console import say
from tunesmith.core import formats
from tunesmith.plan import build
from tunesmith.plan.model_check import this_machine, wish_of
from tunesmith.plan.plan import Plan
from tunesmith.project import Project


def fetch_base_model(
    project: Project,
    name: str,
    mirror: str,
    revision: str | None,
    *,
    code: bool = False,
    judge: Judge = require_trainable,
) -> ModelFolder:
    model = build.fetch_model(
        project,
        name,
        download_progress(),
        mirror=mirror,
        revision=revision,
        remote_code=code,
        judge=judge,
    )
    say_base_model(model)
    return model


def with_base_model(project: Project, plan: Plan, mirror: str, revision: str | None = None) -> Plan:
    """Return a plan with its base model, fetched to this machine if need be."""
    name = str(plan.request.needed_model().name)
    overrides = plan.request.overrides
    values = plan.request.predict if plan.config is None else plan.config
    merge = "merge" in plan.phases
    # A preset tries by itself how many rows fit.
    before = {item.key: item.was for item in plan.managed} if plan.request.preset == "fast" else {}
    insisted = {*overrides, *(["template"] if name in project.base_models else [])}
    wish = wish_of(
        values or {}, insisted, merge=merge, machine=this_machine(), before_preset=before
    )

    def judge(seen: Seen) -> None:
        for note in judge_model(seen, wish).notes:
            say(note)

    code = bool(overrides.get("trust_remote_code"))
    model = fetch_base_model(project, name, mirror, revision, code=code, judge=judge)
    return plan.with_model(model, tensor_shapes(model.path))


def say_base_model(model: ModelFolder) -> None:
    size = formats.size(sum(record.size for record in model.files.values()))
    how = "fetched and verified" if model.fetched else "verified before, unchanged"
    say(f"base model: {model.name} from {model.source} ({size}, {how})")
    say(f"  {model.path}")


def download_progress() -> Callable[[Progress], None]:
    """Return a callback that tells about a download at most once a second."""
    said_at = 0.0

    def tell(progress: Progress) -> None:
        nonlocal said_at
        if progress.total is None or time.monotonic() - said_at >= 1:
            said_at = time.monotonic()
            say(f"  {progress.render()}")

    return tell


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
