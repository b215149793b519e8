"""What tasks.py calls: one function a verb, which runs it and prints the outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.fetch import ModelFolder, Progress
from tunesmith.cli.console import console, moving, say, write
from tunesmith.cli.follow import Detached, follow
from tunesmith.core import formats, isolated
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.mirrors import known_mirrors, load_mirror
from tunesmith.core.printable import printable
from tunesmith.hosts import inventory
from tunesmith.hosts.remote import SSH_FAILED
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import Summary
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.manifest import PARTS, USUAL
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import Cause, RunStatus
from tunesmith.plan import build
from tunesmith.plan.config import Config
from tunesmith.plan.plan import Plan
from tunesmith.plan.target import Target
from tunesmith.project import Project
from tunesmith.targets import adoption, factory
from tunesmith.targets.host import HostTarget
from tunesmith.targets.local import LocalTarget


def train(root: Path, on: str, asked: build.Asked, choices: Choices) -> str | None:
    """Train, follow, and do what was asked to follow; return the run id."""
    project = Project.at(root)
    target = _target(project, on)
    if choices.from_laptop:
        _host(target)
    if choices.dry:
        say(build.plan_training(project, target, asked, None).render())
        if choices.from_laptop:
            say(f"before that the base model goes to {target.name} from {choices.from_laptop}")
        return None
    # What can be wrong is found before anything is fetched or uploaded.
    config = build.read_config(project, asked.config, asked.overrides)
    _tell_data(project, build.plan_training(project, target, asked, None))
    name = str(config.get("model_name_or_path"))
    _check_after(target, asked.then)
    if choices.from_laptop:
        _host(target).send_model(name, project.find(choices.from_laptop))
    fetched_there = target.fetch_order(name, asked.revision, asked.mirror) is not None
    mirror = asked.mirror or "default"
    code = bool(config.overrides.get("trust_remote_code"))
    model = None if fetched_there else _model(project, name, mirror, asked.revision, code=code)
    plan = build.plan_training(project, target, asked, model)
    _tell_decisions(config, asked, plan)
    run_id = build.start_training(project, target, plan)
    say(f"run {run_id}" + (f" on {target.name}" if target.shared else ""))
    if not choices.attach:
        say(f"started; `inv attach{_on(target)} --run {run_id}` follows it")
        return run_id
    _finish(project, target, run_id)
    return run_id


@dataclass(frozen=True)
class Choices:
    """How a verb is to be done: `dry` shows, `attach` follows, `from_laptop` is the folder of
    a base model to upload."""

    dry: bool = False
    attach: bool = True
    from_laptop: str = ""


def resume(
    root: Path,
    on: str,
    run: str | None,
    *,
    mirror: str | None = None,
    max_hours: float | None = None,
    cause: Cause = "resume",
    dry: bool,
) -> None:
    """Continue a run's unfinished phases and follow them.

    Without a run, on a host: what a rebuild has taken is brought back, and every run that a
    restart has cut off goes on, one after the other; the first is followed. `max_hours`
    takes the place of the run's own limit.
    """
    project = Project.at(root)
    target = _target(project, on)
    if run is None and isinstance(target, HostTarget) and not dry:
        _heal(root, target, mirror)
        target.renew_autostart()
        started, refused = target.resume_all()
        for why in refused:
            say(why)
        for run_id in started:
            say(f"run {run_id}: continues")
        if started:
            _finish(project, target, started[0])
            return
    run_id = _usable(project, target, run, dry=dry)
    status = target.status(run_id)
    left = [phase for phase, state in status.phases.items() if state != "succeeded"]
    if status.state == "succeeded":
        raise UsageError(f"run {run_id} has succeeded; there is nothing to continue")
    if dry:
        say(f"would continue run {run_id} with {', '.join(left) or 'its first phase'}")
        return
    if max_hours is not None:
        build.set_limit(target, run_id, max_hours)
    offset = target.events(run_id, 0)[1]
    target.start(run_id, left if set(left) & {"merge", "proof", "predict"} else (), cause)
    say(f"run {run_id}")
    _finish(project, target, run_id, offset)


def _heal(root: Path, target: HostTarget, mirror: str | None) -> None:
    """Bring a host to the state it was provisioned for; one that is there costs one look."""
    from tunesmith.cli import provision as cli_provision

    asked = target.layout.asked
    flavour = asked.get("flavour", "auto")
    name = mirror or asked.get("mirror", "default").partition(":")[0]
    if mirror is None and name not in known_mirrors(root / "configs" / "mirrors"):
        say(
            f"{target.name} was provisioned with a mirror file of your own; with --mirror FILE "
            "what a rebuild has taken is brought back too"
        )
        return
    cli_provision.provision(
        root,
        target.name,
        mirror=name,
        flavour=None if flavour == "auto" else flavour,
        toolkit=asked.get("toolkit") == "yes",
    )


def attach(root: Path, on: str, run: str | None) -> None:
    """Follow a run to its end, and do what was asked to follow."""
    project = Project.at(root)
    target = _target(project, on)
    # The newest has to be asked for; a name is believed, so that its state shows at once.
    _finish(project, target, RunId(run) if run else target.find(None))


def stop(root: Path, on: str, run: str | None) -> None:
    """Ask for a checkpoint and an end, and wait for it."""
    target = _target(Project.at(root), on)
    run_id = target.find(run)
    target.stop(run_id)
    say(f"run {run_id}: stopping after a checkpoint")
    status = target.status(run_id)
    for look in target.watch(run_id, target.events(run_id, 0)[1]):
        status = look.status
    say(f"run {run_id}: {status.state} at step {status.step}; {status.message}")


def pull(
    root: Path,
    on: str,
    run: str | None,
    what: str,
    *,
    merge_here: bool = False,
    mirror: str = "",
    dry: bool = False,
) -> None:
    """Bring a run, or parts of it (PARTS), from a host under .tunesmith/runs/.

    `merge_here`: bring what a merge needs instead of the merged model, and merge; `mirror` is
    that of the base model.
    """
    project = Project.at(root)
    if merge_here:
        # One that is unknown is told before the host works.
        load_mirror(mirror or "default", project.root / "configs" / "mirrors")
    elif mirror:
        raise UsageError(
            f"--mirror {mirror}: a pull comes from {on} itself; it is for --merge-here"
        )
    target = _host(_target(project, on))
    parts = build.words_of(what) or (USUAL if merge_here else PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError(f"--what {unknown[0]}: it takes {', '.join(PARTS)}")
    if merge_here and ("adapter" not in parts or "merged" in parts):
        raise UsageError(f"--what {what}: --merge-here brings the adapter and makes the rest")
    run_id = target.find(run)
    if merge_here or dry:
        # Before the host works for a pull that would be refused.
        target.check_pull(run_id)
    if merge_here:
        build.check_trained(target, run_id)
    if dry:
        say(f"would pull {', '.join(parts)} of run {run_id} from {target.name}")
        if merge_here:
            name = str(target.request(run_id).needed_model().name)
            say(f"would merge its adapter with {_base_model(project, name, mirror or 'default')}")
        return
    if merge_here:
        _make_kit(target, run_id)
    _pull(target, run_id, parts)
    if merge_here:
        _merge_here(project, run_id, mirror or "default")


def _make_kit(target: HostTarget, run_id: str) -> None:
    """Let the host write all of the merged model but its weights."""
    say(f"{target.name}: writing what belongs around the weights")
    code = target.interact("tunesmith.job.merge.bundle", ["--run", str(target.place(run_id).run)])
    if code == SSH_FAILED:
        raise TunesmithError(
            f"{target.name}: the connection was lost; the same command goes on where it ended"
        )
    if code:
        raise SystemExit(code)  # it has said why itself


def _base_model(project: Project, name: str, mirror: str) -> str:
    """Return where a base model lies here, or would be fetched from."""
    stored = [entry.model.path for entry in model_store.entries(project.models, name)]
    if there := next((path for path in stored if path.is_dir()), None):
        return f"{name} in {there}"
    return f"{name}, fetched from {_sources(project, name, mirror)}"


def _merge_here(project: Project, run_id: str, mirror: str) -> None:
    """Merge a pulled run with the base model of this machine, which is fetched if need be.

    With the training environment it is merged and proven as on the host, without one by NumPy.
    """
    adoption.settle(project, run_id, lambda name: _model(project, name, mirror, None))
    if project.environment().current():
        target = _target(project, "local")
        _work_on(target, build.plan_merge(project, target, run_id, ()))
    else:
        say("no training environment here: NumPy does the sums, and no proof is made")
        run = project.run_folder(run_id).absolute()
        argv = isolated.argv(sys.executable, "tunesmith.job.merge.offline", str(run))
        if code := subprocess.run(
            argv, cwd=isolated.NOWHERE, check=False, stdout=subprocess.DEVNULL
        ).returncode:
            raise SystemExit(code)
    say(f"merged model: {project.run_folder(run_id) / 'merged'}")


def remove(root: Path, on: str, run: str, *, dry: bool) -> None:
    """Delete a run."""
    target = _target(Project.at(root), on)
    run_id = target.find(run)
    if dry:
        say(f"would delete run {run_id}{_on(target)}")
        return
    say(f"run {run_id}: deleted, {formats.size(target.remove(run_id))} free again")


def list_runs(root: Path, on: str, *, as_json: bool) -> None:
    """Print every run."""
    project = Project.at(root)
    names = ["local", *inventory.names(project.inventory)] if on == "all" else on.split(",")
    found = []
    silent = 0
    for name in names:
        try:
            found += _target(project, name).runs()
        except TunesmithError as error:
            if len(names) == 1:
                raise
            # One host that is off must not hide the runs of the others.
            silent += 1
            console.print(error.render(), markup=False, soft_wrap=True, style="red")
    if as_json:
        say(json.dumps(encode(found), ensure_ascii=False, indent=2))
        return
    if not found:
        say("no runs yet; `inv train` or `make demo` makes one")
        return
    table = Table(box=None, pad_edge=False)
    # An id is there to be copied: it is never cut.
    table.add_column("run", no_wrap=True, overflow="ignore")
    for name in ("on", "state", "step", "loss", "phases"):
        # Neither is what a run does, and why, where there is room for little.
        table.add_column(name, overflow="fold" if name == "state" else "ellipsis")
    for run in found:
        step = f"{run.step or 0}/{run.total_steps or '?'}"
        loss = f"{run.loss:.4f}" if run.loss is not None else ""
        table.add_row(run.run_id, run.on, _state(run), step, loss, _phases(run.phases))
    console.print(table)
    for run in found:
        if run.failure == "damaged":
            on = "" if run.on == "local" else f" on {run.on}"
            say(f"run {run.run_id}{on}: {run.message}")
    if silent:
        raise TunesmithError(f"{silent} of {len(names)} targets did not answer; see above")


def _state(run: RunStatus) -> str:
    """Return a run's state, with the failure or, while it is worked on, what has started it."""
    if run.failure:
        return f"{run.state} ({run.failure})"
    cause = run.cause if run.active else None
    # That somebody has asked for it is the usual case.
    if cause in (None, "user"):
        return run.state
    after = f": {run.retried}" if run.retried else ""
    return f"{run.state} ({cause}{after})"


def _phases(phases: Mapping[str, str]) -> str:
    """Return the phases in words; what has succeeded needs none beside its name."""
    return ", ".join(
        name if state == "succeeded" else f"{name} {state}" for name, state in phases.items()
    )


def logs(root: Path, on: str, run: str | None, *, follow: bool) -> None:
    """Print a run's log, and with `follow` what is added to it until the run ends."""
    target = _target(Project.at(root), on)
    try:
        for look in target.watch(target.find(run), log=0):
            if look.lost is not None:
                sys.stderr.write(f"{printable(look.lost)}\n")
                continue
            write(look.log)
            if not follow and not look.more:
                return
    except KeyboardInterrupt:
        return


def merge(
    root: Path,
    on: str,
    run: str | None,
    overrides: tuple[str, ...],
    *,
    accept: bool = False,
    dry: bool,
) -> None:
    """Merge and prove a run's adapter; `accept`: although its prompts differ from the trained."""
    project = Project.at(root)
    target = _target(project, on)
    run_id = _usable(project, target, run, dry=dry)
    plan = build.plan_merge(project, target, run_id, overrides, accept=accept)
    if not dry:
        _work_on(target, plan)
        say(f"merged model: {_where(target)}{plan.place.run / 'merged'}")
        return
    say(plan.render())


def predict(
    root: Path,
    on: str,
    config: Path,
    run: str | None,
    overrides: tuple[str, ...],
    *,
    mirror: str,
    dry: bool,
) -> None:
    """Answer a data set with LLaMA-Factory's do_predict and print the scores."""
    project = Project.at(root)
    target = _target(project, on)
    model = None
    values = build.read_config(project, config, overrides)
    name = str(values.get("model_name_or_path"))
    code = bool(values.overrides.get("trust_remote_code"))
    if not dry and run is None and target.fetch_order(name, None, mirror or None) is None:
        model = _model(project, name, mirror or "default", None, code=code)
    run_id = _usable(project, target, run, dry=dry) if run else None
    plan = build.plan_predict(project, target, config, overrides, run_id, model, mirror or None)
    if dry:
        say(plan.render())
        return
    summary = _work_on(target, plan)
    for name, value in sorted((summary.metrics or {}).items()):
        say(f"{name:<36} {value}")
    say(f"answers: {_where(target)}{Path(summary.output or '') / 'generated_predictions.jsonl'}")


def chat(
    root: Path,
    on: str,
    run: str | None,
    *,
    what: str,
    prompt: str,
    system: str,
    greedy: bool,
    max_new_tokens: int,
    dry: bool,
) -> None:
    """Open a chat, or answer one prompt."""
    project = Project.at(root)
    target = _target(project, on)
    # A merged model needs no base model beside it.
    alone = what == "merged"
    run_id = target.find(run) if alone else _usable(project, target, run, dry=dry)
    arguments = ["--run", str(target.place(run_id).run), "--what", what]
    arguments += ["--prompt", prompt] if prompt else []
    arguments += ["--system", system] if system else []
    arguments += ["--greedy"] if greedy else []
    arguments += ["--max-new-tokens", str(max_new_tokens)] if max_new_tokens else []
    if dry:
        say(f"python -I -m tunesmith.job.evaluation.chat {' '.join(arguments)}")
        return
    code = target.interact("tunesmith.job.evaluation.chat", arguments)
    if code:
        raise SystemExit(code)  # it has said why itself


def report(root: Path, on: str, run: str | None, *, language: str) -> Path:
    """Write the report and print the comparison."""
    from tunesmith.report.page import write_report
    from tunesmith.report.terminal import summary_table

    target = _target(Project.at(root), on)
    folder = target.results(target.find(run))
    page = write_report(folder, language=language)
    console.print(summary_table(folder, language=language))
    say(f"report:  {page}")
    say(f"picture: {folder / 'training_loss.png'}")
    return page


def demo(root: Path, *, mirror: str, dry: bool) -> None:
    """Do the main job with the small model: fetch, train, measure, merge, prove, report."""
    asked = build.Asked(
        Path("configs/train/smollm2_135m_lora_sft.yaml"),
        prompts=Path("configs/prompts/philosophy.yaml"),
        mirror=mirror,
    )
    if dry:
        train(root, "local", asked, Choices(dry=True))
        return
    began = time.monotonic()
    install_stack(root, None, mirror=mirror, dry=False)
    run_id = train(root, "local", asked, Choices())
    merge(root, "local", run_id, (), dry=False)
    report(root, "local", run_id, language="en")
    folder = Project.at(root).run_folder(run_id)
    say("")
    say(f"run:     {folder}")
    say(f"adapter: {folder / 'output'}")
    say(f"merged:  {folder / 'merged'}")
    say(f"chat:    .venv/bin/inv chat --run {run_id}")
    say(f"all in   {formats.duration(time.monotonic() - began)}")


def fetch_model(
    root: Path,
    name: str,
    *,
    revision: str | None,
    mirror: str,
    from_path: str | None,
    allow_pickle: bool,
    dry: bool,
) -> None:
    """Fetch and verify one base model."""
    project = Project.at(root)
    if dry:
        sources = _sources(project, name, mirror)
        say(f"would fetch {name} from {from_path or sources}")
        return
    model = build.fetch_model(
        project,
        name,
        _progress(),
        mirror=mirror,
        revision=revision,
        from_path=Path(from_path) if from_path else None,
        allow_pickle=allow_pickle,
    )
    _tell_model(model)


def _sources(project: Project, name: str, mirror: str) -> str:
    """Return the kinds of sources of a base model, and the hub's address."""
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    known = build.known_models(project).get(name)
    sources = ", ".join(known.sources) if known else "hub"
    return f"{sources} ({profile.hf_endpoints[0]})"


def list_models(root: Path) -> None:
    """Print configs/models.yml."""
    table = Table(
        "base model", "template", "weights", "licence", "sources", box=None, pad_edge=False
    )
    for model in build.known_models(Project.at(root)).values():
        size = formats.size(model.size_bytes)
        table.add_row(model.repo_id, model.template, size, model.licence, ", ".join(model.sources))
    console.print(table)


def show_stack(root: Path) -> None:
    """Print what is pinned, and which environments are here."""
    project = Project.at(root)
    stack = project.stack
    say(f"Python {stack.python}, LLaMA-Factory {stack.llamafactory}")
    for flavour in stack.flavours.values():
        default = " (default)" if flavour.name == stack.default_flavour else ""
        capabilities = ", ".join(flavour.compute_capabilities)
        installed = project.environment(flavour.name)
        state = f"installed in {installed.path}" if installed.current() else "not installed here"
        say(f"{flavour.name}{default}: CUDA {flavour.cuda}, {' '.join(flavour.requirements)}")
        say(f"  driver >= {flavour.minimum_driver}, compute capability {capabilities}")
        say(f"  lock {flavour.lock_sha256[:12]}, {formats.size(flavour.size_bytes)}, {state}")
    for line in stack.requirements:
        say(f"  {line}")
    for key, value in sorted(stack.variables.items()):
        say(f"{key}={value}")


def lock_stack(root: Path, *, mirror: str, dry: bool) -> None:
    """Resolve the locks anew."""
    from tunesmith.stack import environment as stack_environment

    project = Project.at(root)
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    if dry:
        for flavour in project.stack.flavours.values():
            say(f"would resolve {flavour.lock} from {len(project.stack.inputs(flavour))} lines")
        return
    for path in stack_environment.lock(project.stack, project.root, profile):
        say(f"{path}")


def render_stack(root: Path, *, dry: bool) -> None:
    """Rewrite the files derived from the stack."""
    from tunesmith.maintain import render

    project = Project.at(root)
    for path, text in render.render(project).items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            say(f"{path}: up to date")
        elif dry:
            say(f"{path}: would be rewritten")
        else:
            render.write(path, text)
            say(f"{path}: rewritten")


def check_stack(root: Path) -> None:
    """Fail when a lock or a derived file is not of this stack.yml."""
    from tunesmith.maintain import render
    from tunesmith.stack import definition

    project = Project.at(root)
    lines = [*definition.drift(project.stack), *render.drift(project)]
    if lines:
        raise TunesmithError(f"{len(lines)} files have drifted from configs/stack.yml", lines)
    say("locks and derived files are of this configs/stack.yml")


def install_stack(root: Path, flavour: str | None, *, mirror: str, dry: bool) -> None:
    """Install the training environment of this machine."""
    from tunesmith.stack import environment as stack_environment

    project = Project.at(root)
    environment = project.environment(flavour)
    if dry:
        say(f"would install {environment.flavour.lock} in {environment.path}")
        return
    began = time.monotonic()
    profile = load_mirror(mirror, project.root / "configs" / "mirrors")
    project.folder()
    versions = stack_environment.install(project.stack, environment, project.root, profile, say)
    if versions is None:
        say(f"training environment: {environment.path} ({environment.flavour.name}, current)")
        return
    say(
        f"training environment: {environment.path} (Python {versions['python']}, LLaMA-Factory "
        f"{versions['llamafactory']}, torch {versions['torch']}) in "
        f"{formats.duration(time.monotonic() - began)}"
    )


def _model(
    project: Project, name: str, mirror: str, revision: str | None, *, code: bool = False
) -> ModelFolder:
    model = build.fetch_model(
        project, name, _progress(), mirror=mirror, revision=revision, remote_code=code
    )
    _tell_model(model)
    return model


def _tell_model(model: ModelFolder) -> None:
    size = formats.size(sum(record.size for record in model.files.values()))
    how = "fetched and verified" if model.fetched else "verified before, unchanged"
    say(f"base model: {model.name} from {model.source} ({size}, {how})")
    say(f"  {model.path}")


def _progress() -> Callable[[Progress], None]:
    """Return a callback that tells about a download at most once a second."""
    said_at = 0.0

    def tell(progress: Progress) -> None:
        nonlocal said_at
        if progress.total is None or time.monotonic() - said_at >= 1:
            said_at = time.monotonic()
            say(f"  {progress.render()}")

    return tell


def _work_on(target: Target, plan: Plan) -> Summary:
    """Start a plan's phases, follow them, and return the last phase's summary."""
    run_id = plan.run_id
    offset = target.events(run_id, 0)[1] if target.exists(run_id) else 0
    build.start_on_run(target, plan)
    _await(target, run_id, offset)
    events, _ = target.events(run_id, offset)
    summary = next((event for event in reversed(events) if isinstance(event, Summary)), None)
    if summary is None:
        raise TunesmithError(
            f"run {run_id}: its last phase has left no summary in events.jsonl; see "
            f"`inv logs{_on(target)} --run {run_id}`"
        )
    return summary


def _finish(project: Project, target: Target, run_id: str, offset: int = 0) -> None:
    """Follow a run; when it has succeeded, write its report and do what was asked to follow."""
    _await(target, run_id, offset)
    request = target.request(run_id)
    then = [word for word in request.then or () if word in build.THEN]
    if "pull" in then and isinstance(target, HostTarget):
        _pull(target, run_id, PARTS)
    else:
        _write_report(target.results(run_id))
    if isinstance(target, HostTarget):
        _leave(target, run_id, then)


def _pull(target: HostTarget, run_id: str, parts: tuple[str, ...]) -> Path:
    folder = target.pull(run_id, parts)
    size = sum(record.size for record in RunFolder(folder).copied().files.values())
    say(f"pulled: {folder} ({formats.size(size)}, every file as on {target.name})")
    if "report" in parts:
        # Of the data that came: the host's own page stays there.
        _write_report(folder)
    return folder


def _write_report(folder: Path) -> None:
    if (folder / "config.yaml").is_file():
        from tunesmith.report.page import write_report

        say(f"report: {write_report(folder)}")


def _leave(target: HostTarget, run_id: str, then: list[str]) -> None:
    """Power the host off when that was asked for; else say what leaving it alone costs."""
    platform = target.platform
    if "poweroff" in then and "pull" in then:
        say(f"{target.name}: powering off")
        try:
            target.power_off(run_id)
        except UsageError as error:
            say(f"{target.name} stays on: {error.line}")
            return
        say(f"{target.name}: off; {platform.note}")
    elif "poweroff" in then:
        say(f"{target.name}: powers itself off; {platform.note}")
    elif "pull" not in then:
        say(f"fetch it: inv pull --on {target.name} --run {run_id}")
    if platform.release_days:
        say(
            f"{platform.name} deletes an instance and its disk {platform.release_days} days after "
            "power-off"
        )


def _check_after(target: Target, then: tuple[str, ...]) -> None:
    """Refuse what cannot follow a run on this target, before it is started."""
    here = [word for word in then if word in ("pull", "poweroff")]
    if here and not isinstance(target, HostTarget):
        raise UsageError(f"--then {here[0]} is for hosts; this run is on {target.name}")
    if "poweroff" in then and isinstance(target, HostTarget):
        target.poweroff_command()


def _await(target: Target, run_id: str, offset: int) -> None:
    """Follow a run to its end. Raises TunesmithError when it failed; leaves on Ctrl-C."""
    ended = follow(target, run_id, console, offset)
    on = _on(target)
    if isinstance(ended, Detached):
        say(
            f"\nthe run goes on; `inv attach{on} --run {run_id}` follows it, "
            f"`inv stop{on} --run {run_id}` ends it"
        )
        raise SystemExit(os.EX_OK)
    if ended.state == "failed":
        log = target.results(run_id) / "train.log"
        raise TunesmithError(f"run {run_id} failed: {ended.message}", [f"log: {log}"])
    if ended.state == "stopped":
        say(f"run {run_id}: stopped at step {ended.step}; {ended.message}")
        raise SystemExit(os.EX_OK)


def _target(project: Project, on: str) -> Target:
    return factory.target_of(project, on, say, moving)


def _usable(project: Project, target: Target, run: str | None, *, dry: bool) -> str:
    """Return the id of a run to work with; one pulled from a host gets its base model here."""
    run_id = target.find(run)
    if isinstance(target, LocalTarget) and not dry:
        adoption.settle(project, run_id, lambda name: _model(project, name, "default", None))
    return run_id


def _host(target: Target) -> HostTarget:
    if not isinstance(target, HostTarget):
        raise UsageError(f"this is for hosts: --on NAME; {target.name} keeps its runs here")
    return target


def _on(target: Target) -> str:
    """Return the option that names a target, empty for the default one."""
    return "" if target.name == "local" else f" --on {target.name}"


def _where(target: Target) -> str:
    """Return what goes before a path of a target, empty for one of this machine."""
    return f"{target.name}:" if target.shared else ""


def _tell_data(project: Project, plan: Plan) -> None:
    for found in plan.request.data:
        # Without rows the file is none of ours: a hub's address.
        if found.rows is None:
            say(f"data set: {found.key} from {found.file} (not checked)")
            continue
        file = build.shown(project, Path(found.file))
        rows, warnings = found.rows, found.figures["warnings"]
        say(f"data set: {found.key} from {file} ({rows} rows checked, {warnings} warnings)")


def _tell_decisions(config: Config, asked: build.Asked, plan: Plan) -> None:
    if "template" in config.overrides and not any(
        w.startswith("template=") for w in asked.overrides
    ):
        say(f"template: {config.get('template')} (that of {config.get('model_name_or_path')})")
    for item in plan.owned:
        if item.was not in (None, item.value) and item.key not in (
            "model_name_or_path",
            "output_dir",
        ):
            say(f"{item.key}: {item.was} -> {item.value} ({item.why})")
