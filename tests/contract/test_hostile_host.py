"""A host that answers with payloads: none is executed, none is a traceback, each is refused in
one line that names host and field, or is harmless text by the time it is used.

Most are answered by a stand-in for ssh and host (tests/standins/hostile_host.py); one a verb
comes over a real sshd in test_hostile_sshd.py.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import pytest
from rich.console import Console

from tests.standins import hostile_host as hostile
from tunesmith.cli.follow import follow
from tunesmith.core.errors import TunesmithError
from tunesmith.core.printable import printable
from tunesmith.doctor.check import check
from tunesmith.hosts import agent, inventory, layout, models
from tunesmith.hosts.address import Address
from tunesmith.hosts.inventory import Host
from tunesmith.hosts.login import log_in
from tunesmith.hosts.probe.software import Engine
from tunesmith.hosts.remote import Remote
from tunesmith.image import ship
from tunesmith.job.run.replies import (
    CommandResult,
    Manifest,
    Removed,
    Resumed,
    RunList,
    RunNamed,
    RunShown,
    RunSnapshot,
)
from tunesmith.job.run.schema import RunStatus
from tunesmith.project import Project
from tunesmith.provision import container, drift
from tunesmith.targets.host import HostTarget

pytestmark = pytest.mark.contract

KEY = (
    "tunesmith-gpu1 ssh-ed25519 "
    "AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
)
ADDRESS = Address("gpu1.example.com", 42151, "root")
TEXTS = (
    "{{ lookup('pipe', 'touch CANARY') }}",
    "{% set x = lookup('pipe', 'touch CANARY') %}",
    "{# #}{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "$(touch CANARY)",
    "`touch CANARY`",
    "; touch CANARY",
    "x${IFS}&&touch${IFS}CANARY",
    "' ; touch CANARY ; '",
    '" | touch CANARY #',
    "a\ntouch CANARY\n",
    "a\0b",
    "\x1b]52;c;dG91Y2ggQ0FOQVJZ\x07",
    "\x1b[2J\x1b]0;title\x1b\\x",
    "\x9b31mred\x9d0;t\x9c",
    "A" * 100_000,
    "9" * 5000,
    "-1",
    "NaN",
    "1e999",
    "../../../CANARY",
    "!!python/object/apply:os.system ['touch CANARY']",
    "-oProxyCommand=touch CANARY",
    "\u202e/toor\u2066",
    "[bold red]x[/]",
    "\ud800",
)
# As they stand in JSON.
VALUES = (
    "[" * 3000 + "]" * 3000,
    '{"a":' * 400 + "1" + "}" * 400,
    "9" * 5000,
    "NaN",
    "-Infinity",
    "-1",
    "1e999",
    "{}",
    "[]",
    "null",
    "true",
    '"\\ud800\\u001b]52;c;eA==\\u0007"',
)
NOT_IN_A_PATH = set("{}$`\"'\\;|&<>*?!#%[]\n\0\x1b")

Ask = Callable[[Project], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A question, the field that lies, and the answer."""

    question: str
    field: str
    answer: str
    path: bool = False


def lines_with(values: Mapping[str, str], key: str, payload: str) -> str:
    return hostile.lines_of({**values, key: payload})


def at(value: Any, keys: tuple[Any, ...], raw: str) -> str:
    """Return JSON of `value` with the raw JSON text `raw` at a place."""
    changed = copy.deepcopy(value)
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = "@here@"
    return json.dumps(changed).replace('"@here@"', raw)


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value in JSON, the containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*before, key)
        if isinstance(item, dict | list):
            yield from places(item, (*before, key))


def fields() -> Iterator[tuple[str, str, Callable[[str], str], bool, bool]]:
    """Yield question, field, how the answer is made of a payload, whether it is JSON, a path."""
    yield "login", "Python", lambda p: lines_with(hostile.LOGIN, "python", f"3.12 {p}"), False, True
    yield "login", "version", lambda p: lines_with(hostile.LOGIN, "python", f"{p} /x"), False, False
    paths = (
        "home",
        "nvidia_smi",
        "data_disk",
        "base",
        "provisioned",
        "hf_home",
        "hf_cache",
        "mirror_file",
    )
    for question, answer in (
        ("layout", hostile.LAYOUT),
        ("probe", hostile.PROBE),
        ("engine", hostile.ENGINE),
        ("container", hostile.CONTAINER),
    ):
        for key in answer:
            yield (
                *(question, key),
                lambda p, k=key, a=answer: lines_with(a, k, p),
                *(False, key in paths),
            )
        for place in places(json.loads(hostile.MADE)) if "environment" in answer else ():
            yield (
                *(question, str(place[-1])),
                lambda p, w=place, a=answer: lines_with(
                    a, "environment", f"/data/x\t{at(json.loads(hostile.MADE), w, p)}"
                ),
                *(True, False),
            )
    found = hostile.STATE["found"]
    state = json.dumps(hostile.STATE)
    yield "state", "base", lambda p: hostile.state_of(p, state, found), False, True
    yield (
        *("state", "found"),
        lambda p: hostile.state_of("/data/tunesmith", state, [*found, f"x={p}"]),
        *(False, False),
    )
    for place in places(hostile.STATE):
        yield (
            *("state", str(place[-1])),
            lambda p, w=place: hostile.state_of("/data/tunesmith", at(hostile.STATE, w, p), found),
            *(True, False),
        )
    for verb, answer in hostile.AGENT.items():
        for place in places(answer):
            yield (
                *(f"agent {verb}", str(place[-1])),
                lambda p, a=answer, w=place: at(a, w, p) + "\n",
                *(True, False),
            )
    for place in places(hostile.SERVICE):
        yield (
            *("services", str(place[-1])),
            lambda p, w=place: at(hostile.SERVICE, w, p) + "\n",
            *(True, False),
        )
    yield (
        "models",
        "manifest",
        lambda p: at({"files": {"a": {"sha256": ""}}}, ("files",), p) + "\n",
        True,
        False,
    )


def cases() -> tuple[Case, ...]:
    """Return a spread of payloads over all fields, the same ones each time."""
    found = []
    for i, (question, field, build, is_json, is_path) in enumerate(fields()):
        texts = [json.dumps(text) for text in TEXTS] if is_json else list(TEXTS)
        texts = [f"/data/{text}" for text in texts] if is_path else texts
        payloads = [*(VALUES if is_json else ()), *texts]
        # Others at each field: in the end every payload comes at many of them. Of the answers
        # with most fields each gets one.
        many = question in ("agent runs", "agent show", "agent watch")
        every = range(5 * i, 5 * i + 1) if many else range(5 * i, 5 * i + 26, 13)
        for j in range(len(payloads)) if question == "login" else every:
            found.append(Case(question, field, build(payloads[j % len(payloads)]), is_path))
    return tuple(found)


CASES = cases()


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200
    assert {case.question for case in CASES} == set(hostile.ANSWERS)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "CANARY"


@pytest.fixture
def project(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A client whose ssh leads to the hostile host, working where a canary would appear."""
    place = tmp_path / "inventory"
    monkeypatch.setenv("TUNESMITH_INVENTORY", str(place))
    monkeypatch.setenv("HOME", str(tmp_path))
    host = Host("gpu1", ADDRESS.text, "2026-11-25T10:00:00+00:00", None, None, (KEY,))
    inventory.write(place, host, ADDRESS)
    programs = tmp_path / "programs"
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text(f"#!{sys.executable} -IS\n" + Path(hostile.__file__).read_text())
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOSTILE_HOST", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    answers(tmp_path, None, "")
    return Project(root, tmp_path / "home")


def answers(folder: Path, question: str | None, answer: Any) -> None:
    """Let the host answer a question so from now on."""
    plan = {"question": question, "answer": answer}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


def states(project: Project) -> Any:
    state = drift.check_states(project, ["gpu1"], {"app": "1", "flavour": "auto"})[0]
    if state.error:
        raise state.error
    return state


def remote(project: Project) -> Remote:
    return Remote("gpu1", project.inventory)


def there(project: Project) -> layout.Layout:
    return layout.look(remote(project))


REPLIES: dict[str, type] = {
    **dict.fromkeys(("find", "create", "renew", "start", "stop"), RunNamed),
    "show": RunShown,
    "runs": RunList,
    "watch": RunSnapshot,
    "manifest": Manifest,
    "remove": Removed,
    "afterwards": CommandResult,
    "resume-all": Resumed,
}
ASKS: dict[str, Ask] = {
    "login": lambda _: log_in("gpu1", ADDRESS, (KEY,)),
    "probe": lambda project: check(project, "gpu1", "default"),
    "layout": there,
    "state": states,
    "services": lambda project: (
        HostTarget(project, "gpu1").services(ending=True).ask("start", "api", body={})
    ),
    "models": lambda project: models._look(remote(project), there(project), "org/tiny", "/u"),
    "engine": lambda project: ship.look(remote(project)),
    "container": lambda project: container._look(remote(project), Engine),
    **{
        f"agent {verb}": lambda project, v=verb: agent.call(
            remote(project), v, "run-1", reply=REPLIES[v]
        )
        for verb in hostile.AGENT
    },
}


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text of a result."""
    if isinstance(value, str | PurePath):
        yield str(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from texts_in([getattr(value, f.name) for f in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(texts_in, [*value.keys(), *value.values()]))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from itertools.chain.from_iterable(map(texts_in, value))


@pytest.mark.parametrize("question", sorted(hostile.ANSWERS))
def test_the_genuine_answer_is_taken(project: Project, question: str) -> None:
    assert ASKS[question](project) is not None


@pytest.mark.parametrize("question", sorted(hostile.ANSWERS))
def test_what_a_host_says_is_refused_or_harmless(
    project: Project, tmp_path: Path, canary: Path, question: str
) -> None:
    for case in CASES:
        if case.question != question:
            continue
        answers(tmp_path, question, case.answer)
        try:
            result = ASKS[question](project)
        except TunesmithError as error:
            said = error.message
            assert "gpu1" in said, (case, said)
            assert printable(said) == said and "\n" not in said and len(said) < 1000, (case, said)
            continue
        finally:
            assert not canary.exists(), case
        for text in texts_in(result):
            # A file's name is looked at where it is used, and a fault there told by name.
            assert printable(text) == text or question == "agent manifest", (case, text)
        if case.path:
            own = [text for text in texts_in(result) if text.startswith("/data/")]
            assert not NOT_IN_A_PATH & set("".join(own)), (case, own)


STRICT = [
    ("login", lines_with(hostile.LOGIN, "python", "3.12 /a b/python"), "its Python for Ansible"),
    ("login", lines_with(hostile.LOGIN, "python", "3.12 /x/{{ lookup('pipe', 'x') }}"), "python"),
    ("login", lines_with(hostile.LOGIN, "end", "soon"), "its answer to the probe: end"),
    ("layout", lines_with(hostile.LAYOUT, "provisioned", "/data/$(touch CANARY)"), "provisioned"),
    ("layout", lines_with(hostile.LAYOUT, "uid", "9" * 5000), "uid"),
    ("layout", lines_with(hostile.LAYOUT, "fingerprint", "app=$(touch CANARY)"), "fingerprint"),
    ("layout", lines_with(hostile.LAYOUT, "environment", "/x/`touch CANARY`\t{}"), "environment"),
    ("probe", lines_with(hostile.PROBE, "memory.total", "9" * 5000), "memory.total"),
    ("probe", lines_with(hostile.PROBE, "data_disk", "/x/../y"), "data_disk"),
    ("agent find", '{"run_id": "../../x"}\n', "run_id"),
    ("agent remove", '{"freed": ' + "9" * 5000 + "}\n", "answer to `remove`"),
    ("agent show", "[" * 9 + '{"a":' * 99_999, "show"),
    ("agent show", '{"request": ' + "[" * 99_999 + "]" * 99_999 + "}", "answer to `show`"),
    ("agent watch", at(hostile.WATCH, ("events", 0, "attempt"), '"x"'), "attempt"),
    ("agent watch", at(hostile.WATCH, ("status", "eta_seconds"), "NaN"), "eta_seconds"),
    ("agent runs", '{"runs": [{"run_id": "a"}]}', "state"),
    ("services", at(hostile.SERVICE, ("key",), '"x; touch CANARY"'), "key"),
    ("services", at(hostile.SERVICE, ("port",), "70000"), "port"),
    ("engine", lines_with(hostile.ENGINE, "image", "sha256:x"), "image"),
    ("container", lines_with(hostile.CONTAINER, "gid", "0; touch CANARY"), "gid"),
]


@pytest.mark.parametrize(("question", "answer", "field"), STRICT)
def test_a_refusal_names_host_and_field(
    project: Project, tmp_path: Path, canary: Path, question: str, answer: str, field: str
) -> None:
    answers(tmp_path, question, answer)
    with pytest.raises(TunesmithError, match=r"^gpu1: ") as told:
        ASKS[question](project)
    assert field in told.value.message
    assert "\n" not in told.value.message
    assert not canary.exists()


def test_a_watch_is_read_as_an_answer_is(project: Project, tmp_path: Path) -> None:
    target = HostTarget(project, "gpu1")
    with (tmp_path / "shown").open("w") as stream:
        ended = follow(target, "run-1", Console(file=stream))
    assert isinstance(ended, RunStatus) and ended.state == "succeeded"
    answers(tmp_path, "agent watch", at(hostile.WATCH, ("events", 1, "step"), '"x"') + "\n")
    with pytest.raises(TunesmithError, match=r"^gpu1: its answer to `watch`\.events\[1\]"):
        list(target.watch("run-1"))


@pytest.mark.parametrize("where", ["stdout", "stderr"])
@pytest.mark.parametrize("question", ["layout", "probe", "agent show"])
def test_a_host_that_floods_is_refused(
    project: Project, tmp_path: Path, question: str, where: str
) -> None:
    answers(tmp_path, question, {"flood": where})
    with pytest.raises(TunesmithError, match=r"^gpu1: .* sends more .*; the rest was not read"):
        ASKS[question](project)
    # In kB: that of this process, tests before it included.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 500_000


@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_a_watch_that_floods_is_refused(project: Project, tmp_path: Path, where: str) -> None:
    answers(tmp_path, "agent watch", {"flood": where})
    with pytest.raises(TunesmithError, match=r"^gpu1: .* sends more than "):
        list(HostTarget(project, "gpu1").watch("run-1"))


def test_a_login_that_floods_is_refused(project: Project, tmp_path: Path) -> None:
    answers(tmp_path, "login", {"flood": "stdout"})
    login = log_in("gpu1", ADDRESS, (KEY,))
    assert login.kind == "unknown"
    assert login.reason.message.startswith("gpu1: ")
    assert "it sends more than" in login.reason.message
