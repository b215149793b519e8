"""The verbs against a host that lies, over a real sshd whose forced command is the host."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_ssh import Client, Sshd, client, short, started
from tests.standins import hostile_host as hostile
from tunesmith.cli import listing, pulling, training
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.printable import printable
from tunesmith.doctor.check import check
from tunesmith.hosts import commands, inventory
from tunesmith.plan.options import TrainOptions
from tunesmith.provision import playbook
from tunesmith.provision.events import Step

pytestmark = pytest.mark.contract

__all__ = ["client", "short"]  # fixtures


class Liar:
    """The host: `lies` says which question it answers with what."""

    def __init__(self, sshd: Sshd) -> None:
        self.sshd = sshd

    def lies(self, question: str | None, answer: Any) -> None:
        plan = {"question": question, "answer": answer}
        (self.sshd.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


@pytest.fixture
def liar(short: Path, client: Client) -> Iterator[Liar]:
    for sshd in started(short):
        sshd.stop()
        program = f"{sys.executable} -IS {Path(hostile.__file__).resolve()}"
        banner = sshd.folder / "banner"
        banner.write_text("\x1b]52;c;dG91Y2g=\x07\x1b[2JWelcome {{ 1 }}\n")
        sshd.extra = [f"ForceCommand {program} {sshd.folder}", f"Banner {banner}"]
        sshd.authorize(client.key)
        made = Liar(sshd)
        made.lies("login", python(sys.executable))
        sshd.start()
        yield made


@pytest.fixture
def canary(client: Client) -> Iterator[Path]:
    """What a payload would make here: not there at the end, whatever the test does."""
    path = client.home / "CANARY"
    yield path
    assert not path.exists(), "a payload was executed"


@pytest.fixture
def known(client: Client, liar: Liar) -> Liar:
    """The same host, added while it told the truth."""
    commands.add(client.project, "gpu1", liar.sshd.line, identity=client.key)
    liar.lies(None, "")
    return liar


def python(path: str) -> str:
    """Return the answer to a login of a host that calls this its Python."""
    return hostile.lines_of({**hostile.LOGIN, "python": f"3.12.3 {path}"})


def jinja(canary: Path) -> str:
    return f"{{{{ lookup('pipe', 'touch {canary}') }}}}"


def refused(verb: Callable[[], Any], *words: str) -> str:
    with pytest.raises(TunesmithError) as told:
        verb()
    said = told.value.line
    assert "\n" not in said and printable(told.value.render()) == told.value.render()
    assert all(word in said for word in words), said
    return said


def test_add(client: Client, liar: Liar, canary: Path) -> None:
    for payload in (
        jinja(canary),
        f"/x/{jinja(canary)}",
        f"/$(touch {canary})",
        "/a%0A/b",
        "\x1b[2J",
    ):
        liar.lies("login", python(payload))
        refused(
            lambda: commands.add(client.project, "gpu1", liar.sshd.line, identity=client.key),
            *("gpu1: ", "ython"),
        )
        assert not (client.inventory / "hosts.yml").exists(), "nothing is written"
    # What it says before a login, too.
    (client.home / ".ssh/id_ed25519.pub").unlink()
    (liar.sshd.home / ".ssh/authorized_keys").write_text("")
    refused(
        lambda: commands.add(client.project, "gpu1", liar.sshd.line, identity=client.key), "gpu1"
    )


def test_check(client: Client, known: Liar, canary: Path) -> None:
    for key, value in (("data_disk", f"/{jinja(canary)}"), ("memory.total", "9" * 5000)):
        known.lies("probe", hostile.lines_of({**hostile.PROBE, key: value}))
        refused(lambda: check(client.project, "gpu1", "default"), "gpu1: ", key)
    name = f"\x1b]0;x\x07[red]{jinja(canary)}"
    known.lies("probe", hostile.lines_of({**hostile.PROBE, "os.name": name}))
    seen = check(client.project, "gpu1", "default")
    assert seen.facts.system.os_name == f"[red]{jinja(canary)}", "a text is a text"


def test_train(client: Client, known: Liar, root: Path, canary: Path) -> None:
    asked = TrainOptions(config=Path("configs/train/smollm2_135m_lora_sft.yaml"))
    for key in ("provisioned", "hf_home", "uid"):
        known.lies("layout", hostile.lines_of({**hostile.LAYOUT, key: f"/{jinja(canary)}"}))
        refused(
            lambda: training.train(root, "gpu1", asked, training.Choices()),
            f"gpu1: its answer to the probe: {key}",
        )


def test_attach(client: Client, known: Liar, root: Path, canary: Path) -> None:
    for key, value in (
        ("log_offset", [jinja(canary)]),
        ("events", [{"event": "eval", "step": "x"}]),
    ):
        known.lies("agent watch", json.dumps(hostile.WATCH | {key: value}) + "\n")
        refused(lambda: training.attach(root, "gpu1", "run-1"), "gpu1: its answer to `watch`", key)


def test_logs_reach_the_terminal_printable(
    client: Client, known: Liar, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = "step 1\r\n\x1b]52;c;eA==\x07\x1b[2Jloss 2\x07\n"
    known.lies("agent watch", json.dumps(hostile.WATCH | {"log": log}) + "\n")
    listing.logs(root, "gpu1", "run-1", follow=False)
    assert capsys.readouterr().out == "step 1\nloss 2\n"


def test_pull(client: Client, known: Liar, root: Path, canary: Path) -> None:
    record = {"size": 3, "sha256": "ab" * 32}
    manifests: tuple[dict[str, Any], ...] = (
        {"config.yaml": record | {"sha256": f"$(touch {canary})"}},
        {"config.yaml": record | {"size": -1}},
        {f"../../{jinja(canary)}": record},
    )
    for files in manifests:
        known.lies("agent manifest", json.dumps({"files": files}) + "\n")
        refused(lambda: pulling.pull(root, "gpu1", "run-1", ""), "gpu1: ")
    assert not (client.project.runs / "run-1").exists()


def test_provision_reads_a_poisoned_inventory_as_text(
    client: Client, known: Liar, canary: Path
) -> None:
    """The way it was found: the interpreter of an inventory that an older version wrote."""
    file = client.inventory / "hosts.yml"
    values = inventory.parse(file.read_text())
    before = file.read_text()
    for key in ("ansible_python_interpreter", "host_address", "ansible_ssh_common_args"):
        host = dict(values["gpu_hosts"]["hosts"]["gpu1"]) | {key: jinja(canary)}
        file.write_text(json.dumps({"gpu_hosts": {"hosts": {"gpu1": host}}}))
        with pytest.raises(UsageError) as told:
            playbook.provision(
                client.project, ["gpu1"], playbook.ProvisionOptions(), lambda _: None
            )
        said = told.value.message
        assert all(word in said for word in (str(file), "`gpu1`", key)), said
        assert "`inv host.remove gpu1`" in told.value.hint
    commands.remove(client.project, "gpu1")
    assert "gpu1" not in file.read_text(), "the remedy does it"
    file.write_text(before)


def test_provision_takes_a_poisoned_answer_as_text(
    client: Client, known: Liar, canary: Path
) -> None:
    """The real playbook, up to the first task that reads what the host says of itself."""
    payload = rf"\nbase=/x/{jinja(canary)}"
    known.lies("any", {"swap": [r"\\nbase=[^\\]*", payload]})
    steps: list[Step] = []
    done = playbook.provision(client.project, ["gpu1"], playbook.ProvisionOptions(), steps.append)
    (host,) = done.hosts
    assert host.name == "gpu1" and host.message is not None
    assert "its answer to the probe: base: expected an absolute path" in host.message, host
    assert "\n" not in host.message


def test_a_variable_of_ours_is_no_template(client: Client, known: Liar, canary: Path) -> None:
    """Even one that got past the parser: it is written so that Ansible takes it as it is."""
    text = inventory.variables({"a": jinja(canary), "b": {"c": [jinja(canary)]}})
    (client.home / "vars.yml").write_text(text)
    play = client.home / "play.yml"
    play.write_text(
        "- hosts: gpu_hosts\n  gather_facts: false\n  vars_files: [vars.yml]\n  tasks:\n"
        "    - ansible.builtin.debug: {msg: '{{ a }} {{ b.c[0] }} {{ host_address }} {{ mine }}'}\n"
    )
    file = client.inventory / "hosts.yml"
    found = inventory.find(client.inventory, "gpu1")
    address = inventory.address_of(client.inventory, "gpu1")
    inventory.write(client.inventory, found, address)
    raw = inventory.parse(file.read_text())
    raw["gpu_hosts"]["hosts"]["gpu1"]["mine"] = inventory.Unsafe(jinja(canary))
    inventory._dump(client.inventory, raw)
    playbook.provision(
        client.project, ["gpu1"], playbook.ProvisionOptions(), lambda _: None, playbook=play
    )
    log = next((client.project.home / "provision").glob("*/ansible.log")).read_text()
    # YAML doubles the quotes.
    assert log.count(f"touch {canary}") >= 3


def test_a_flood_ends_the_play(
    client: Client, known: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playbook, "_MOST_MEMORY", 180_000_000)
    known.lies("any", {"flood": "stdout"})
    said = refused(
        lambda: playbook.provision(
            client.project, ["gpu1"], playbook.ProvisionOptions(), lambda _: None
        ),
        *("gpu1: ", "sends more than a task can have to say"),
    )
    assert "inv host.check --on" in said
