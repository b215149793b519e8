"""Whether a host is as `inv provision` would leave it: one SSH command, no playbook.

Two things are compared. The *fingerprint* says what was asked for: stack, locks, mirror,
roles, our own sources. What is *found* there says that nobody has changed it since: record.sh
wrote it down after the last good run, and the probe looks again now. A fingerprint alone would
lie about a host that somebody edited by hand.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError
from tunesmith.core.files import sha256_of, short_digest
from tunesmith.core.mirrors import Mirror
from tunesmith.core.printable import one_line
from tunesmith.hosts.answers import (
    AnswerSource,
    Each,
    MalformedError,
    Record,
    Text,
    parse_json,
)
from tunesmith.hosts.probe.answer import Answer, TruncatedError
from tunesmith.hosts.probe.ask import ask
from tunesmith.hosts.probe.host import Places
from tunesmith.hosts.probe.installed import Findings
from tunesmith.hosts.probe.script import with_findings
from tunesmith.hosts.remote import Remote
from tunesmith.project import Project
from tunesmith.stack.definition import Stack
from tunesmith.stack.sources import app_digest

# What a host is asked.
SECTIONS = (Places, Findings)
# What cannot be mended piece by piece, and the findings that tell it was changed.
_MADE_ANEW = {"environment": ("tree:envs/", "python:"), "app": ("tree:app/",)}

_TREE = re.compile(r"^(\d{1,15}) files (\d{1,19}) bytes (\d{1,24})$")
# What record.sh writes: it lets no other character through itself.
_PLAIN = r"[ -~]*"
_STATE = Record(
    {
        "fingerprint": Text(_PLAIN, 4000, "a fingerprint"),
        "found": Each(Text(_PLAIN, 8000, "a finding"), 100_000),
    }
)
_LONGEST = 16 << 20


@dataclass(frozen=True)
class State:
    """What one look at a host said.

    `drift` has a line for each difference and is empty when the host is in state.
    `distrusted` names what somebody changed there since and has to be made again, whatever
    its finish marker says: `environment`, `app`. `base` is the folder of ours, None when the
    host was never provisioned. `error` is why the look failed. `seconds` is how long it took.
    """

    name: str
    base: str | None
    drift: tuple[str, ...]
    distrusted: tuple[str, ...] = ()
    seconds: float = 0.0
    error: TunesmithError | None = None

    @property
    def in_state(self) -> bool:
        """Whether provisioning again would change nothing."""
        return self.error is None and not self.drift


def wanted_state(
    stack: Stack,
    mirror: Mirror,
    *,
    flavour: str | None,
    toolkit: bool,
    app: str,
    roles: str,
) -> dict[str, str]:
    """Return what is asked for, part by part, as short text.

    `flavour` is the one asked for (None: the host decides), `toolkit` whether nvcc is
    wanted, `app` and `roles` are the digests of our sources and of the roles.
    """
    source = asdict(mirror) | {"name": None, "ca_bundle": str(mirror.ca_bundle)}
    if mirror.ca_bundle and mirror.ca_bundle.is_file():
        source["ca"] = sha256_of(mirror.ca_bundle)
    locks = [flavour.lock_sha256 for flavour in stack.flavours.values()]
    return {
        "app": short_digest(app),
        "flavour": flavour or "auto",
        "locks": short_digest([*locks, sha256_of(stack.build_constraints)]),
        "mirror": f"{re.sub('[^A-Za-z0-9._-]+', '-', mirror.name)}:{short_digest(source)}",
        "roles": short_digest(roles),
        "stack": short_digest(sha256_of(stack.path)),
        "toolkit": "yes" if toolkit else "no",
    }


def fingerprint(wanted: Mapping[str, str]) -> str:
    """Return `wanted` as one word, from which it can be told which part differs."""
    return ",".join(f"{key}={value}" for key, value in sorted(wanted.items()))


def wanted_of(
    project: Project, mirror: Mirror, *, flavour: str | None = None, toolkit: bool = False
) -> dict[str, str]:
    """Return what this clone would bring to a host. Raises UsageError: unknown flavour."""
    if flavour:
        project.stack.flavour(flavour)
    return wanted_state(
        project.stack,
        mirror,
        flavour=flavour,
        toolkit=toolkit,
        app=app_digest(project.root),
        roles=roles_digest(project.root),
    )


def roles_digest(root: Path) -> str:
    """Return the sha256 over everything in ansible/ that decides what is done to a host."""
    digest = hashlib.sha256()
    top = root / "ansible"
    for path in sorted(top.rglob("*")):
        parts = path.relative_to(top).parts
        if path.is_file() and parts[0] != "inventory" and "__pycache__" not in parts:
            digest.update(f"{'/'.join(parts)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def check_states(
    project: Project, names: Sequence[str], wanted: Mapping[str, str]
) -> tuple[State, ...]:
    """Look at several hosts at once; the states come in the order of `names`.

    Raises UsageError, before any host is asked, for a name that is not in the inventory.
    """
    remotes = [Remote(name, project.inventory) for name in names]
    with ThreadPoolExecutor(max_workers=min(32, len(remotes) or 1)) as pool:
        return tuple(pool.map(lambda remote: _look(remote, wanted), remotes))


def check_reach(project: Project, names: Sequence[str]) -> tuple[State, ...]:
    """Log in to several hosts at once and do nothing there; only `error` of a state counts.

    A host that is off, or has another host key, is told in one line before Ansible starts.
    Raises UsageError for a name that is not in the inventory.
    """
    remotes = [Remote(name, project.inventory) for name in names]
    with ThreadPoolExecutor(max_workers=min(32, len(remotes) or 1)) as pool:
        return tuple(pool.map(_reach, remotes))


def _reach(remote: Remote) -> State:
    began, error = time.monotonic(), None
    try:
        remote.run("exit 0")
    except TunesmithError as failed:
        error = failed
    return State(remote.name, None, (), seconds=time.monotonic() - began, error=error)


def record_script() -> str:
    """Return the shell script that writes state.json: `sh -s -- BASE FINGERPRINT`."""
    text = Path(__file__).with_name("record.sh").read_text(encoding="utf-8")
    return with_findings(text)


def _look(remote: Remote, wanted: Mapping[str, str]) -> State:
    began = time.monotonic()
    try:
        answer = ask(remote, *SECTIONS, timeout=120)
        state = state_of(answer, wanted)
    except TruncatedError as error:
        # What is there is not known: the playbook finds out.
        said = one_line(" ".join(error.detail)[-200:])
        state = State(remote.name, None, (f"the probe did not come to its end there: {said}",))
    except TunesmithError as error:
        state = State(remote.name, None, (), error=error)
    return replace(state, seconds=time.monotonic() - began)


def state_of(answer: Answer, wanted: Mapping[str, str]) -> State:
    """Return the state of a host from its answer for `SECTIONS`.

    Raises TunesmithError for what no such host says.
    """
    name, base, findings = answer.host, answer.of(Places).provisioned, answer.of(Findings)
    if not base:
        return State(name, None, ("never provisioned, or not to the end: no state.json there",))
    now = _pairs(answer.source("found"), findings.found)
    try:
        asked, was = _recorded(AnswerSource(name, "its state.json"), findings.recorded)
    except MalformedError:
        # What was there is not known, so nothing there can be trusted.
        return State(name, base, (f"{base}/state.json is damaged",), tuple(_MADE_ANEW))
    # What a user added to the environment changes nothing that we installed.
    added = {key for key in now if key.startswith("tree:envs/") and key not in was}
    changed = [key for key in sorted({*was, *now} - added) if was.get(key) != now.get(key)]
    found = [_told(key, was.get(key), now.get(key)) for key in changed]
    distrusted = [
        what for what, keys in _MADE_ANEW.items() if any(key.startswith(keys) for key in changed)
    ]
    return State(name, base, (*_asked_drift(asked, wanted), *found), tuple(distrusted))


def _recorded(asked: AnswerSource, text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return fingerprint and findings of a state.json.

    Raises MalformedError for one that is damaged, TunesmithError for one that record.sh cannot
    have written.
    """
    raw = parse_json(asked, text, _LONGEST)
    if not isinstance(raw, dict) or not {"fingerprint", "found"} <= raw.keys():
        raise MalformedError(f"{asked.host}: {asked.what}: not a state.json")
    state = _STATE.read(asked, raw)
    parts = [part for part in state["fingerprint"].split(",") if part]
    return _pairs(asked, parts), _pairs(asked, state["found"])


def _pairs(asked: AnswerSource, lines: Sequence[str]) -> dict[str, str]:
    """Return KEY=VALUE lines by key. Raises MalformedError for a line that is none."""
    pairs = [line.strip().partition("=") for line in lines]
    if not all(equals for _, equals, _ in pairs):
        raise MalformedError(f"{asked.host}: {asked.what}: not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _asked_drift(was: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    lines = []
    for key in sorted({*was, *wanted}):
        old, new = was.get(key, "nothing"), wanted.get(key, "nothing")
        if old == new:
            continue
        names = old.partition(":")[0], new.partition(":")[0]
        lines.append(
            {
                "app": "tunesmith's own sources have changed",
                "flavour": f"flavour: provisioned with {old}, now {new} is asked for",
                "locks": "the locks have changed",
                "mirror": f"mirror: provisioned with {names[0]}, now {names[1]} is asked for"
                if names[0] != names[1]
                else f"the mirror profile {names[0]} has changed",
                "roles": "the Ansible roles have changed",
                "stack": "configs/stack.yml has changed",
                "toolkit": f"CUDA toolkit: provisioned with {old}, now {new} is asked for",
            }.get(key, f"{key}: {old} -> {new}")
        )
    return lines


def _told(key: str, was: str | None, now: str | None) -> str:
    """Return one difference in words; `key` is as findings.sh writes it."""
    kind, _, what = key.partition(":")
    if kind == "tree":
        return f"{what}: {_tree_told(was, now)}"
    if kind == "model":
        return f"base model {what}: {now}; a training with it fetches it again"
    if kind in ("start", "file"):
        how = "is new" if was is None else "is gone" if now is None else "was edited"
        return f"{what}: our part {how}" if kind == "start" else f"{what} {how}"
    name = {
        "conda": "conda",
        "disk": "data disk: mount point",
        "gpu": "GPU",
        "python": what,
        "tool": what,
        "user": "user id",
    }.get(kind, key)
    return f"{name}: {was or 'not there'} -> {now or 'not there'}"


def _tree_told(was: str | None, now: str | None) -> str:
    if was is None or now is None:
        return "is gone" if now is None else "is new"
    before, after = _TREE.match(was), _TREE.match(now)
    if not before or not after:
        return f"{was} -> {now}"
    if before[1] != after[1]:
        return f"{before[1]} files -> {after[1]} files"
    if before[2] != after[2]:
        sizes = formats.size(int(before[2])), formats.size(int(after[2]))
        shown = " -> ".join(dict.fromkeys(sizes))
        return f"{shown} ({int(after[2]) - int(before[2]):+d} bytes)"
    return "a file was rewritten with the same size"
