"""Look at one host of the inventory: one ssh exec, nothing changed."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.basemodel.judge import Machine
from tunesmith.core import formats
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.core.mirrors import Mirror
from tunesmith.doctor.facts import SECTIONS, Facts, facts_of
from tunesmith.doctor.flavours import Decision
from tunesmith.doctor.rules import PROGRAMS, decide, judge
from tunesmith.doctor.verdicts import Verdict
from tunesmith.hosts.probe.ask import ask
from tunesmith.hosts.probe.script import ProbeSettings
from tunesmith.hosts.remote import Remote
from tunesmith.plan import build, model_check
from tunesmith.plan.config import Config
from tunesmith.project import Project
from tunesmith.stack.definition import Stack

TIMEOUT = 60  # seconds; the probe itself bounds each of its steps


@dataclass(frozen=True)
class Checked:
    """What a check found; the last verdict is the decision in words."""

    host: str
    mirror: str
    facts: Facts
    verdicts: tuple[Verdict, ...]
    decision: Decision

    @property
    def counts(self) -> Counter[str]:
        """How many verdicts there are of each level."""
        return Counter(verdict.level for verdict in self.verdicts)

    @property
    def exit_code(self) -> int:
        """0 when nothing is critical, else 1."""
        return 1 if self.counts["critical"] else 0

    def to_json(self) -> JsonObject:
        """Return plain values; the keys stay as they are from release to release."""
        return {
            "host": self.host,
            "mirror": self.mirror,
            "exit_code": self.exit_code,
            "decision": asdict(self.decision),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "facts": asdict(self.facts),
        }


def check(
    project: Project,
    name: str,
    mirror: str,
    requested: str | None = None,
    config: Path | None = None,
) -> Checked:
    """Probe the host `name` and judge it for `mirror` and, if given, the flavour `requested`, and
    for a training by `config`.

    Raises UsageError for an unknown host, mirror or flavour, TunesmithError when the host
    cannot be reached or does not answer whole.
    """
    stack = project.stack
    stack.flavour(requested)
    training = build.read_config(project, config, ()) if config else None
    source = project.mirror(mirror)
    remote = Remote(name, project.inventory)
    settings = settings_of(source, stack)
    began = time.time()
    answer = ask(remote, *SECTIONS, settings=settings, timeout=TIMEOUT)
    ended = time.time()
    seen = facts_of(answer, stack.environment_name)
    # The host told its time at some moment between these two.
    now = min(max(float(seen.system.epoch), began), ended)
    decision = decide(seen, stack, requested)
    verdicts = judge(seen, stack, source, now, decision)
    if training:
        verdicts = (*verdicts[:-1], fit(project, training, seen), verdicts[-1])
    return Checked(name, source.name, seen, verdicts, decision)


def fit(project: Project, config: Config, facts: Facts) -> Verdict:
    """Return whether a training by this config fits into the memory of a host's GPUs."""
    gpus = tuple(gpu.memory_total for gpu in facts.gpu.gpus if gpu.memory_total)
    machine = Machine(gpus, facts.resources.memory) if gpus or not facts.gpu.gpus else None
    wish = model_check.wish_of(config.values, config.overrides, merge=False, machine=machine)
    name = str(config.get("model_name_or_path"))
    try:
        found = model_check.check_model(project, name, wish)
    except UsageError as error:
        return Verdict("critical", "training", error.message, error.hint)
    if found.estimate is None:
        text = f"{name}: its config.json is not here yet; it is looked at before its weights come"
        return Verdict("unknown", "training", text)
    total = formats.size(found.estimate.total)
    short = [note for note in found.notes if note.startswith("memory: ")]
    text = f"{config.file.name} takes about {total} of " + (
        f"a GPU's {formats.size(min(gpus))}" if gpus else "memory, and there is no GPU"
    )
    return Verdict("warning" if short else "pass", "training", text, short[0] if short else "")


def settings_of(mirror: Mirror, stack: Stack) -> ProbeSettings:
    """Return what the probe is to try. Raises UsageError when the CA file is not there."""
    authorities = ""
    if mirror.ca_bundle:
        try:
            authorities = mirror.ca_bundle.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"mirror {mirror.name}: `ca_bundle`: {mirror.ca_bundle}: {error.strerror}"
            ) from None
    return ProbeSettings(
        environment=stack.environment_name,
        programs=PROGRAMS,
        urls=tuple(addresses(mirror, stack)),
        proxy=mirror.http_proxy or "",
        ca=authorities,
    )


def addresses(mirror: Mirror, stack: Stack) -> list[tuple[str, str]]:
    """Return (kind, URL) of one small thing of each address that a host uses."""
    version = stack.conda.version
    installer = f"Miniforge3-{version}-Linux-x86_64.sh"
    folders = [url.replace("{version}", version) for url in mirror.miniforge_urls]
    found = [
        *(("pypi", f"{url}/llamafactory/") for url in mirror.pypi_indexes),
        *(("conda", f"{url}/linux-64/repodata.json") for url in mirror.conda_channels),
        *(("miniforge", f"{url}/{installer}") for url in folders),
        *(("hf", f"{url}/") for url in mirror.hf_endpoints),
        *(("apt", f"{url}/") for url in mirror.apt),
    ]
    return [(kind, "".join(url.split())) for kind, url in found]
