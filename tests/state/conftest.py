"""What is promised, asked of a live host (`inv host.verify --on NAME`) or an image.

Collected only with `--hosts` (testinfra's option), as there is no host to ask without it.
Nothing here changes anything there, and no expectation is written here that stands in
configs/stack.yml or a lock.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.names import ENVIRONMENT_MARKER
from tunesmith.hosts.probe.answer import Answer
from tunesmith.hosts.probe.host import Places
from tunesmith.hosts.probe.script import ProbeSettings, script
from tunesmith.stack.definition import Flavour, Stack, load_stack

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--state-results", help="write the outcome of each test here, as JSON lines")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return True if config.getoption("hosts", None) is None else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    path = item.config.getoption("--state-results")
    # A test that never ran (a fixture failed or skipped) is told once, too.
    if path and (report.when == "call" or (report.when == "setup" and not report.passed)):
        documented = getattr(item, "obj", None)
        text = (getattr(documented, "__doc__", None) or item.name).strip().splitlines()[0]
        text = text.rstrip(".") + _variant(item)
        why = "" if report.passed else _why(report, call)
        line = {"text": text, "outcome": report.outcome, "why": why}
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    return report


def _variant(item: pytest.Item) -> str:
    """Return which case of a parametrized test it is, the host excepted."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    cases = [str(value) for name, value in parameters.items() if not name.startswith("_")]
    return f": {', '.join(cases)}" if cases else ""


def _why(report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    error = call.excinfo.value if call.excinfo else report.longrepr
    lines = str(error).strip().splitlines()
    return " ".join(lines[:3]) or type(error).__name__


@dataclass(frozen=True)
class Place:
    """The host under test, and where ours lies there."""

    host: Any
    base: str
    environment: str
    marker: dict[str, Any]
    disk: str
    data: str

    def run(self, command: str, *words: str) -> str:
        """Run a command there, `%s` replaced by quoted words; return its output."""
        done = self.host.run(command % tuple(map(shlex.quote, words)))
        assert done.rc == 0, f"{command}: exit code {done.rc}: {done.stderr.strip()[-300:]}"
        return str(done.stdout)

    def script(self, text: str, *words: str) -> str:
        """Run sh code there with `words` as $1, $2, ..."""
        arguments = " ".join(map(shlex.quote, words))
        done = self.host.run(f"/bin/sh -c {shlex.quote(text)} sh {arguments}")
        assert done.rc == 0, f"exit code {done.rc}: {done.stderr.strip()[-300:]}"
        return str(done.stdout)

    def python(self, code: str) -> str:
        """Run Python code in the environment."""
        return self.run("%s -I -c %s", f"{self.environment}/bin/python", code)


@pytest.fixture(scope="session")
def stack() -> Stack:
    """What this clone wants a host to be."""
    return load_stack(ROOT / "configs" / "stack.yml")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """An image keeps only what does not need a host: no conda, no data disk, no state.json."""
    if str(config.getoption("hosts", "")).startswith("docker://"):
        items[:] = [item for item in items if "provisioned" not in item.fixturenames]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def provisioned(place: Place) -> Place:
    """A place that provisioning made; tests that ask for it are not asked of an image."""
    return place


def in_image(host: Any, stack: Stack) -> Place:
    """Where ours lies in a container of the image (docker/Dockerfile)."""
    base = "/opt/tunesmith"
    environment = f"{base}/envs/{stack.environment_name}"
    text = host.run(f"cat {environment}/{ENVIRONMENT_MARKER}").stdout
    assert text, f"{environment}: no {ENVIRONMENT_MARKER}, so this is no image of ours"
    return Place(host, base, environment, json.loads(text), "/workspace", f"{base}/app/data")


@pytest.fixture(scope="module")
def place(host: Any, stack: Stack) -> Place:
    """Our folder there. Fails when the host was never provisioned to the end."""
    if host.backend.get_connection_type() == "docker":
        return in_image(host, stack)
    find = script([Places.SECTION], ProbeSettings())
    told = host.run(f"/bin/sh -c {shlex.quote(find)}").stdout
    base = Answer(told, "the host", (Places,)).of(Places).provisioned
    assert base, "not provisioned, or not to the end: there is no state.json"
    disk = base.rpartition("/")[0]
    environment = f"{base}/envs/{stack.environment_name}"
    text = host.run(f"cat {shlex.quote(f'{environment}/{ENVIRONMENT_MARKER}')}").stdout
    assert text, f"{environment}: no {ENVIRONMENT_MARKER}, so it was not finished"
    return Place(host, base, environment, json.loads(text), disk, f"{base}/data")


@pytest.fixture(scope="module")
def flavour(place: Place, stack: Stack) -> Flavour:
    """The flavour that was chosen for the host."""
    return stack.flavour(place.marker["flavour"])
