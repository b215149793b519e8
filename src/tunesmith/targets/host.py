"""A provisioned host as a target: everything lives there, nothing in the client.

Runs are folders on the host's data disk, worked on by the host's own supervisor. This side
asks (hosts/agent.py), brings files (hosts/transfer.py), and can be closed at any moment.
"""

from __future__ import annotations

import functools
import hashlib
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from tunesmith.basemodel.judge import Machine
from tunesmith.core import documents, formats, isolated, swap
from tunesmith.core import files as core_files
from tunesmith.core.callbacks import Bar, OnText, unseen
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import private_folder, sha256_of
from tunesmith.hosts import agent, autostart, layout, models, relay, transfer
from tunesmith.hosts.agent import LostError
from tunesmith.hosts.layout import Layout
from tunesmith.hosts.platforms import FILE as PLATFORMS
from tunesmith.hosts.platforms import Platform, load_platforms, platform_of
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import Event
from tunesmith.job.run.folder import COPY_FILE, MERGED, RunFolder
from tunesmith.job.run.replies import (
    Manifest,
    Removed,
    Resumed,
    RunList,
    RunNamed,
    RunOrder,
    RunShown,
    RunSnapshot,
    UploadedFile,
)
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import Cause, FetchSpec, ListedRun, RunRequest, RunStatus
from tunesmith.plan.models import refuse_changed
from tunesmith.plan.plan import Plan, RunLocation
from tunesmith.plan.target import Provisioning, Rental, RunUpdate
from tunesmith.project import Project
from tunesmith.services.service import ServiceAccess
from tunesmith.stack.sources import app_digest
from tunesmith.targets import delivery, power, pull
from tunesmith.targets.services import HostServices

# How long a host may be out of reach before a watcher gives up. The run does not care.
_PATIENCE_SECONDS = 1800.0
_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 5.0)
# Then a watch is asked for anew: in a container nobody tells the other end that we are gone.
_TALK_SECONDS = 600.0
# Bytes of the list of a run's files: 10^5 of them have 15 MB.
_MOST_MANIFEST = 64 << 20


class HostTarget:
    """Runs jobs on a host of the inventory. Raises UsageError when the name is not there."""

    shared = True

    def __init__(
        self,
        project: Project,
        name: str,
        tell: OnText = lambda _: None,
        bar: Bar = unseen,
    ) -> None:
        self.name = name
        self._project = project
        self._remote = Remote(name, project.inventory)
        self._tell = tell
        self._bar = bar

    @functools.cached_property
    def layout(self) -> Layout:
        """Where things lie there, asked once."""
        return layout.look(self._remote)

    def _platform(self) -> Platform:
        """Return the rental platform, by its data disk."""
        return platform_of(load_platforms(PLATFORMS), str(self.layout.disk))

    def location(self, run_id: str) -> RunLocation:
        """Return where a run of this id lives, or would live."""
        return RunLocation(self.layout.runs / RunId(run_id), self.layout.python, self._variables())

    def _variables(self) -> dict[str, str]:
        """Return the variables of jobs there."""
        return {
            **self._project.stack.variables,
            "HF_HOME": str(self.layout.hf_home),
            "TUNESMITH_LOCK": self.layout.flavour,
            "TUNESMITH_LOCK_SHA256": self.layout.lock_sha256,
        }

    def remote_path(self, run_id: str, name: str, path: Path) -> str:
        """Return where the input of a config key lies there, or where a cache would."""
        key = PurePosixPath(name).name
        if key in ("tokenized_path", "cache_dir"):
            return str(self.layout.base / "cache" / key / path.name)
        folder = self.layout.runs / run_id / "inputs" / name
        return str(folder / path.name if path.is_file() else folder)

    def extras(self) -> Collection[str]:
        """Return the names of the extras that the environment there has."""
        return self.layout.extras

    def adding(self, extra: str) -> str:
        """Return how the environment there gets an extra."""
        if self.layout.asked.get("runner") == "container":
            names = ",".join([*self.layout.extras, extra])
            return (
                f"run `inv image.build --with {names}`, `inv image.ship --on {self.name}` and "
                f"`inv provision --on {self.name}`"
            )
        return f"run `inv provision --on {self.name} --with {extra}`"

    def room(self) -> tuple[str, int]:
        """Return where runs are kept, and the free bytes there."""
        return f"{self.name}:{self.layout.base}", self.layout.free_bytes

    def machine(self) -> Machine | None:
        """Return None: the fetch phase asks there, before any weight comes."""
        return None

    def fetch_spec(self, name: str, revision: str | None, mirror: str | None) -> FetchSpec | None:
        """Return how a run fetches its base model there.

        Raises UsageError for a mirror profile that the host does not have.
        """
        chosen = mirror or self.layout.mirror
        if chosen.endswith(".yml") and chosen != self.layout.mirror:
            raise UsageError(
                f"--mirror {chosen}: a host uses the mirror file it was provisioned with",
                hint=f"`inv provision --on {self.name} --mirror {chosen}` brings this one",
            )
        return FetchSpec(
            name=name,
            revision=revision,
            mirror=chosen,
            store=str(self.layout.models),
            programs=str(self.layout.base / "uv" / "bin"),
        )

    def find(self, run_id: str | None) -> str:
        """Return the id of a run that exists, by default the newest one's."""
        words = [RunId(run_id)] if run_id else []
        return RunId(agent.call(self._remote, "find", *words, reply=RunNamed).run_id)

    def exists(self, run_id: str) -> bool:
        """Return whether there is such a run."""
        return any(run.run_id == run_id for run in self.runs())

    def create(self, plan: Plan) -> None:
        """Bring the inputs, and make the run's folder: whole or not at all.

        Raises UsageError when the run is there, or when the host has other sources of
        tunesmith than this clone: the two would not understand each other's runs.
        """
        self._same_sources()
        order = RunOrder(plan.request, plan.run_id, plan.config)
        self._deliver("create", (), order, plan)

    def renew(self, plan: Plan) -> None:
        """Replace the request of a run. Raises UsageError while somebody works on it."""
        self._same_sources()
        self._deliver("renew", (plan.run_id,), RunOrder(plan.request), plan)

    def request(self, run_id: str) -> RunRequest:
        """Return what was asked: run.json."""
        return self._show(run_id).request

    def config(self, run_id: str) -> documents.Config:
        """Return the config of the training; empty when the run has none."""
        return dict(self._show(run_id).config or {})

    def start(self, run_id: str, phases: Sequence[str], cause: Cause) -> None:
        """Start phases of a run, detached; return when it is under way or in the queue."""
        words = (run_id, *phases, "--cause", cause)
        agent.call(self._remote, "start", *words, reply=RunNamed, timeout=90)

    def stop(self, run_id: str) -> None:
        """Ask a run for a checkpoint and an end."""
        agent.call(self._remote, "stop", run_id, reply=RunNamed)

    def status(self, run_id: str) -> RunStatus:
        """Return the status as status.json has it."""
        return self._show(run_id).status

    def events(self, run_id: str, offset: int) -> tuple[list[Event], int]:
        """Return the events from byte `offset` on, and the offset behind them."""
        words = ("--events", str(offset), "--log", "-1", "--once")
        snapshot = agent.call(self._remote, "watch", run_id, *words, reply=RunSnapshot)
        return list(snapshot.events), snapshot.events_offset

    def watch(self, run_id: str, events: int = 0, log: int | None = None) -> Iterator[RunUpdate]:
        """Yield updates as the host tells them; after a lost connection go on where it was.

        Raises TunesmithError when the host has been out of reach for half an hour.
        """
        status = RunStatus(run_id=run_id, state="running")
        log_offset = -1 if log is None else log
        fresh, failed, lost_at = False, 0, 0.0
        while True:
            offsets = ("--events", str(events), "--log", str(log_offset))
            words = (*offsets, "--seconds", str(_TALK_SECONDS))
            heard = False
            try:
                for snapshot in agent.watch(self._remote, run_id, *words, fresh=fresh):
                    failed, heard = 0, True
                    status, events = snapshot.status, snapshot.events_offset
                    log_offset = snapshot.log_offset if log is not None else -1
                    update = RunUpdate(
                        status,
                        snapshot.events,
                        events,
                        snapshot.log,
                        max(log_offset, 0),
                        more=snapshot.more,
                    )
                    yield update
                    if update.over:
                        return
                if heard:
                    continue
                reason = f"{self.name} ended the conversation"
            except LostError as error:
                reason = error.line
            if failed == 0:
                lost_at = time.monotonic()
            if time.monotonic() - lost_at > _PATIENCE_SECONDS:
                raise TunesmithError(
                    f"{self.name} has been out of reach for {formats.duration(_PATIENCE_SECONDS)}; "
                    "the run goes on if the host does",
                    [reason],
                    hint=f"`inv attach --on {self.name} --run {run_id}` follows it again",
                )
            yield RunUpdate(status, (), events, "", max(log_offset, 0), lost=reason)
            time.sleep(_RETRY_SECONDS[min(failed, len(_RETRY_SECONDS) - 1)])
            # A kept connection that died may hang for a while: not that one.
            fresh, failed = True, failed + 1

    def runs(self) -> list[ListedRun]:
        """Return the status of every run, oldest first."""
        listed = agent.call(self._remote, "runs", reply=RunList)
        return [replace(run, on=self.name) for run in listed.runs]

    def results(self, run_id: str) -> Path:
        """Return a local copy of the run without its weights, brought up to date.

        Of a run that is worked on, what is written just now is taken as it came.
        """
        folder = self._project.home / "hosts" / self.name / RunId(run_id)
        over = not self.status(run_id).active
        self._download(run_id, ("report", "log"), folder, exact=over)
        return folder

    def pull(self, run_id: str, parts: Sequence[str]) -> Path:
        """Bring parts of a run under .tunesmith/runs/, complete or not at all.

        Parts that were pulled before stay, and so does what was done with them here. Raises
        UsageError as `check_pull` does.
        """
        self.check_pull(run_id)
        folder = self._project.runs / run_id
        self._download(run_id, parts, folder, exact=True, worked_in=True)
        return folder

    def check_pull(self, run_id: str) -> None:
        """Raise UsageError when a run of this name was made here, or while it is worked on.

        Here too: a merge of an earlier pull goes on when its client is gone.
        """
        folder = self._project.runs / RunId(run_id)
        swap.recover(folder.parent)
        if folder.exists() and not (folder / COPY_FILE).is_file():
            raise UsageError(f"run {run_id} was made here; nothing is pulled over it")
        if RunFolder(folder).busy():
            raise UsageError(
                f"run {run_id} is being worked on here",
                hint=f"wait for it (`inv attach --run {run_id}`) or end it "
                f"(`inv stop --run {run_id}`)",
            )
        if self.status(run_id).active:
            raise UsageError(
                f"run {run_id} is being worked on",
                hint=f"pull it when it is over: `inv attach --on {self.name} --run {run_id}`",
            )

    def _download(
        self,
        run_id: str,
        parts: Sequence[str],
        folder: Path,
        *,
        exact: bool,
        worked_in: bool = False,
    ) -> None:
        private_folder(self._project.home)
        there = str(self.layout.runs / run_id)
        host = pull.Host(self.name, self._remote, there, self._tell, self._bar)
        pull.bring(
            host,
            lambda wanted: self._manifest(run_id, wanted),
            run_id,
            parts,
            folder,
            self._project.home,
            exact=exact,
            worked_in=worked_in,
        )

    def remove(self, run_id: str) -> int:
        """Delete a run; return the bytes that became free. Refuses one that is worked on."""
        return agent.call(self._remote, "remove", run_id, reply=Removed, timeout=600).freed

    def interact(self, module: str, arguments: Sequence[str]) -> int:
        """Run a module of the job half there, in the user's terminal; return its exit code."""
        command = ["env", *(f"{key}={value}" for key, value in self._variables().items())]
        command += isolated.argv(self.layout.python, module, *arguments)
        base = shlex.quote(str(self.layout.base))
        script = f"cd {base} && . ./{self.layout.variables.name} && exec {shlex.join(command)}"
        terminal = ["-t"] if sys.stdin.isatty() and sys.stdout.isatty() else ["-T"]
        argv = ["ssh", "-F", str(self._remote.config), *terminal, "-o", "BatchMode=yes"]
        argv += ["-o", "LogLevel=ERROR", self.name, "--", f"/bin/sh -c {shlex.quote(script)}"]
        return relay.run(argv)

    def send_model(self, name: str, folder: Path) -> None:
        """Bring a base model's folder from here into the host's store (hosts.models.send)."""
        models.send(self._remote, self.layout, name, folder, self._tell, self._bar)

    def power_off(self, run_id: str) -> None:
        """Power the host off after a run that has succeeded, as targets/power.py does."""
        power.power_off(self._remote, run_id, self.poweroff_command())

    def rental(self) -> Rental:
        """Return what the host's platform says of one that is off."""
        platform = self._platform()
        return Rental(platform.name, platform.note, platform.release_days)

    def poweroff_command(self) -> tuple[str, ...]:
        """Return what powers the host off. Raises UsageError where that is not known."""
        if self._remote.host.runner == "container":
            raise UsageError(
                f"{self.name}: jobs run in a container there, which cannot power the host off",
                hint="power it off in the console",
            )
        platform = self._platform()
        if platform.poweroff is None:
            raise UsageError(
                f"{self.name}: how a {platform.name} host is powered off from inside is not known",
                hint="power it off in the console, or write `poweroff` into configs/platforms.yml",
            )
        return (*self.layout.sudo, *platform.poweroff)

    def provisioning(self) -> Provisioning:
        """Return what the host was provisioned for."""
        wanted = self.layout.asked
        flavour = wanted.get("flavour", "auto")
        return Provisioning(
            mirror=wanted.get("mirror", "default").partition(":")[0],
            flavour=None if flavour == "auto" else flavour,
            toolkit=wanted.get("toolkit") == "yes",
        )

    def start_hook(self) -> str | None:
        """Return the file that a start of the host runs, by its platform."""
        return self._platform().start_hook

    def ports(self) -> Remote | None:
        """Return how the host's ports are reached."""
        return self._remote

    def services(self, *, ending: bool = False) -> ServiceAccess:
        """Return the way to the host's web services.

        Raises UsageError where the host has other sources than this clone, unless `ending`.
        """
        return HostServices(self._project, self._remote, self.layout, ending=ending)

    def resume_all(self) -> tuple[list[str], list[str]]:
        """Continue every run that ended without a word; return their ids, and why others
        were not continued."""
        words = ("--cause", "resume")
        resumed = agent.call(self._remote, "resume-all", *words, reply=Resumed, timeout=180)
        refused = [agent.addressed(text, self.name) for text in resumed.refused.values()]
        return list(resumed.started), refused

    def autostart(self, *, wanted: bool) -> None:
        """Let the host resume its runs at each start, or not any more (hosts.autostart)."""
        change = autostart.install if wanted else autostart.remove
        change(self._remote, self.layout, PLATFORMS)

    def renew_autostart(self) -> None:
        """Bring back what a rebuild of the host has taken of it."""
        autostart.renew(self._remote, self.layout, PLATFORMS)

    def _show(self, run_id: str) -> RunShown:
        return agent.call(self._remote, "show", run_id, reply=RunShown)

    def _same_sources(self) -> None:
        wanted = core_files.short_digest(app_digest(self._project.root))
        if self.layout.app != wanted:
            raise UsageError(
                f"{self.name} runs a different tunesmith version than this clone",
                hint=f"update it: `inv provision --on {self.name}`",
            )

    def _deliver(self, verb: str, words: Sequence[str], order: RunOrder, plan: Plan) -> None:
        """Upload the inputs that changed and let the agent take them, each by its sha256.

        Results of runs that lie there are taken from them, once the agent has compared those with
        their seals.
        """
        uploaded: dict[str, UploadedFile] = {}
        if inputs := plan.inputs:
            clone = hashlib.sha256(str(self._project.root).encode()).hexdigest()[:8]
            folder = self.layout.base / "uploads" / f"{self._project.root.name}-{clone}"
            files = {item.name: item.source for item in inputs}
            size = sum(path.stat().st_size for path in files.values())
            self._tell(f"uploading what changed of {len(files)} files ({formats.size(size)})")
            with self._bar("uploading") as moved:
                transfer.upload(self._remote, files, str(folder), self._tell, moved)
            uploaded = {
                name: UploadedFile(str(folder / name), path.stat().st_size, sha256_of(path))
                for name, path in files.items()
            }
            refuse_changed(plan.known, {path: uploaded[name] for name, path in files.items()})
        request = order.request
        for link in plan.links:
            part = MERGED if link.folder == MERGED else "adapter"
            there = self._manifest(link.run_id, (part,))
            linked = delivery.linked(link, there, self.layout.runs)
            uploaded |= linked
            request = delivery.with_digest(request, link, linked)
        order = replace(order, request=request, inputs=uploaded)
        agent.call(self._remote, verb, *words, reply=RunNamed, stdin=encode(order), timeout=600)

    def _manifest(self, run_id: str, parts: Sequence[str]) -> Manifest:
        words = (run_id, "--what", ",".join(parts))
        bounds = {"timeout": 3600, "most": _MOST_MANIFEST}
        return agent.call(self._remote, "manifest", *words, reply=Manifest, **bounds)
