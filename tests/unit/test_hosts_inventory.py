"""The inventory: others' entries stay, files are closed to others, names are names."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.hosts import inventory, sshconfig
from tunesmith.hosts.address import Address
from tunesmith.hosts.inventory import Host
from tunesmith.hosts.login import blobs, fingerprint

pytestmark = pytest.mark.unit

KEY = (
    "tunesmith-gpu1 ssh-ed25519 "
    "AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
)
ADDRESS = Address("connect.example.com", 42151, "root", Path("/keys/my key%1"))


def host(name: str, python: str | None = "/opt/conda/bin/python") -> Host:
    keys = (KEY.replace("gpu1", name),)
    return Host(
        name, "root@connect.example.com:42151", "2026-11-25T10:00:00+00:00", python, None, keys
    )


def in_force(config: Path, name: str) -> dict[str, str]:
    """Return what ssh makes of a host's block."""
    argv = ["ssh", "-G", "-F", str(config), name]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "in ventory"
    inventory.write(place, host("gpu1"), ADDRESS)
    inventory.write(place, host("gpu2", None), Address("::1", jump="ops@gate:2200"))
    found = inventory.read(place)
    assert list(found) == ["gpu1", "gpu2"]
    assert found["gpu1"] == host("gpu1")
    assert found["gpu2"].python is None
    assert found["gpu2"].jump == "ops@gate:2200"
    assert inventory.address_of(place, "gpu1") == ADDRESS
    assert inventory.address_of(place, "gpu2") == Address("::1", jump="ops@gate:2200")


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    place = tmp_path / "inventory"
    place.mkdir(mode=0o755)
    inventory.write(place, host("gpu1"), ADDRESS)
    inventory.write(place, host("gpu1"), ADDRESS)
    paths = [place, *place.rglob("*")]
    assert {p.name for p in paths} >= {"hosts.yml", "ssh_config", "known_hosts", "gpu1"}
    for path in paths:
        assert path.stat().st_mode & 0o077 == 0, path
        assert not path.name.endswith(".part")


def test_ssh_itself_reads_the_block(tmp_path: Path) -> None:
    place = tmp_path / "in ven%tory"
    inventory.write(place, host("gpu1"), ADDRESS)
    settings = in_force(inventory.ssh_config(place), "gpu1")
    assert settings["hostname"] == "connect.example.com"
    assert (settings["port"], settings["user"]) == ("42151", "root")
    assert settings["userknownhostsfile"].replace("%%", "%") == str(place / "known_hosts/gpu1")
    assert settings["identityfile"].replace("%%", "%") == str(ADDRESS.identity)
    assert settings["identitiesonly"] == "yes"
    assert settings["stricthostkeychecking"] in ("yes", "true")
    assert settings["forwardagent"] == "no"
    assert settings["hostkeyalias"] == "tunesmith-gpu1"
    assert settings["updatehostkeys"] in ("no", "false")


def test_what_jobs_run_in_is_kept_beside_the_address(tmp_path: Path) -> None:
    inventory.write(tmp_path, replace(host("gpu1"), runner="container"), ADDRESS)
    inventory.write(tmp_path, host("gpu2"), ADDRESS)
    found = inventory.read(tmp_path)
    assert [found[name].runner for name in ("gpu1", "gpu2")] == ["container", "conda"]
    text = (tmp_path / "hosts.yml").read_text()
    assert text.count("runner: ") == 1
    (tmp_path / "hosts.yml").write_text(text.replace("runner: container", "runner: podman"))
    with pytest.raises(UsageError, match="`gpu1`: runner: 'podman' is not what"):
        inventory.read(tmp_path)


def test_other_hosts_and_unknown_keys_stay(tmp_path: Path) -> None:
    inventory.write(tmp_path, host("gpu1"), ADDRESS)
    yml, config = tmp_path / "hosts.yml", tmp_path / "ssh_config"
    raw = inventory.parse(yml.read_text())
    raw["gpu_hosts"]["hosts"]["gpu1"]["my_own"] = 1
    raw["gpu_hosts"]["hosts"]["mine"] = {"ansible_host": "10.0.0.1"}
    raw["gpu_hosts"]["vars"] = {"a": "ä"}
    raw["others"] = {"hosts": {"x": None}}
    yml.write_text(yaml.dump(raw, Dumper=inventory._Dumper, allow_unicode=True))
    text = config.read_text().replace(
        "  ConnectTimeout 15\n", "  ConnectTimeout 15\n  Compression yes\n"
    )
    config.write_text(f"# mine\n{text}\nHost x y\n  Port 7\n\nMatch user z\n  Port 8\n")
    inventory.write(tmp_path, host("gpu2"), ADDRESS)
    inventory.write(tmp_path, host("gpu1", "/usr/bin/python3"), ADDRESS)
    now = inventory.parse(yml.read_text())
    assert now["gpu_hosts"]["hosts"]["gpu1"]["my_own"] == 1
    assert now["gpu_hosts"]["hosts"]["gpu1"]["ansible_python_interpreter"] == "/usr/bin/python3"
    assert now["gpu_hosts"]["hosts"]["mine"] == {"ansible_host": "10.0.0.1"}
    assert now["gpu_hosts"]["vars"] == {"a": "ä"}
    assert now["others"] == {"hosts": {"x": None}}
    assert config.read_text().startswith("# mine\n")
    assert in_force(config, "y")["port"] == "7"
    assert list(inventory.read(tmp_path)) == ["gpu1", "gpu2"]
    inventory.remove(tmp_path, "gpu1")
    assert "gpu1" not in config.read_text()
    assert not (tmp_path / "known_hosts/gpu1").exists()
    assert "Match user z\n  Port 8\n" in config.read_text()
    now = inventory.parse(yml.read_text())
    assert set(now["gpu_hosts"]["hosts"]) == {"gpu2", "mine"}
    assert now["others"] == {"hosts": {"x": None}}


def test_a_users_line_inside_a_block_survives_other_hosts(tmp_path: Path) -> None:
    inventory.write(tmp_path, host("gpu1"), ADDRESS)
    config = tmp_path / "ssh_config"
    config.write_text(config.read_text() + "  Compression yes\n")
    inventory.write(tmp_path, host("gpu2"), ADDRESS)
    assert in_force(config, "gpu1")["compression"] == "yes"
    assert in_force(config, "gpu2")["compression"] == "no"


def test_two_writers_do_not_lose_each_others_hosts(tmp_path: Path) -> None:
    names = [f"gpu{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: inventory.write(tmp_path, host(name), ADDRESS), names))
    assert sorted(inventory.read(tmp_path)) == sorted(names)


def test_remove_tells_the_last_one(tmp_path: Path) -> None:
    inventory.write(tmp_path, host("gpu1"), ADDRESS)
    inventory.write(tmp_path, host("gpu2"), ADDRESS)
    assert not inventory.remove(tmp_path, "gpu1")
    assert inventory.remove(tmp_path, "gpu2")
    assert inventory.read(tmp_path) == {}


def test_an_unknown_host_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no host 'gpu9' .*none yet$") as caught:
        inventory.find(tmp_path, "gpu9")
    assert caught.value.hint.startswith("`inv host.add ")
    inventory.write(tmp_path, host("gpu1"), ADDRESS)
    with pytest.raises(UsageError, match=r"known are: gpu1$"):
        inventory.find(tmp_path, "gpu9")


@pytest.mark.parametrize("text", ["[1]", "a: [", "gpu_hosts: 3", "gpu_hosts: {hosts: {a: 7}}"])
def test_a_broken_inventory_is_named_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "hosts.yml").write_text(text)
    with pytest.raises(UsageError, match=r"hosts\.yml: "):
        inventory.write(tmp_path, host("gpu1"), ADDRESS)
    assert (tmp_path / "hosts.yml").read_text() == text


@pytest.mark.parametrize("name", ["gpu1", "a", "0", "rented.box-2_x", "a" * 31])
def test_names(name: str) -> None:
    assert inventory.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "GPU", "-x", ".x", "_x", "a b", "a/b", "a\n", "a" * 32, "ä", "$(x)", "a,b", "*"),
        *("all", "localhost", "ungrouped", "gpu_hosts"),
    ],
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UsageError):
        inventory.check_name(name)


def test_the_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    for kind in ("ed25519", "ecdsa", "rsa"):
        key = tmp_path / kind
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", key], check=True)
        public = key.with_suffix(".pub").read_text()
        line = f"name {public.strip()}"
        argv = ["ssh-keygen", "-l", "-f", key]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
        assert fingerprint((line,)) == f"{said[1]} {said[-1]}"
        assert blobs((line,)) == {public.split()[1]}


@pytest.mark.parametrize("path", ['/a"b', "/a\nb", "/a${HOME}", "/a\\b"])
def test_a_path_ssh_config_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="plainer path"):
        sshconfig.quoted(Path(path))


def test_a_kept_connection_is_never_that_of_another_key_or_place() -> None:
    def socket(address: Address, *keys: str) -> str:
        text = sshconfig.render("gpu1", address, Path("/k"), keys)
        return next(line for line in text.splitlines() if "ControlPath" in line)

    seen = {
        socket(ADDRESS, "a"),
        socket(ADDRESS, "b"),
        socket(Address("connect.example.com", 42152, "root"), "a"),
        socket(Address("connect.example.com", 42151, "root", jump="gate"), "a"),
    }
    assert len(seen) == 4
    assert socket(ADDRESS, "a") in seen


def test_the_way_through_jump_hosts_asks_nothing() -> None:
    """With a password helper around, a question of the jump host would get the password."""
    address = Address("10.0.0.7", 22, "root", jump="ops@gate:2200,in@inner:23")
    text = sshconfig.render("gpu1", address, Path("/k"), ())
    command = next(line for line in text.splitlines() if "ProxyCommand" in line)
    assert command.split()[1:] == [
        *("ssh", "-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes"),
        *("-J", "ops@gate:2200", "-p", "23", "-l", "in", "-W", "[%h]:%p", "inner"),
    ]


def test_a_home_too_long_for_a_socket_keeps_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sshconfig, "ssh_home", lambda: tmp_path / ("x" * 90))
    text = sshconfig.render("gpu1", ADDRESS, Path("/k"), ())
    assert "ControlMaster no" in text
    assert "ControlPath" not in text


def test_include_is_first_once_and_leaves_the_rest(tmp_path: Path) -> None:
    config = tmp_path / "a b[1]" / "ssh_config"
    config.parent.mkdir()
    config.write_text("Host gpu1\n  Port 77\n")
    own = tmp_path / ".ssh" / "config"
    assert sshconfig.include(config, own)
    assert own.stat().st_mode & 0o777 == 0o600
    assert own.parent.stat().st_mode & 0o777 == 0o700
    before = "# mine\nHost *\n  Port 5"
    own.write_text(before)
    own.chmod(0o664)
    assert sshconfig.include(config, own)
    assert not sshconfig.include(config, own), "the second time nothing is written"
    assert own.read_text().partition("\n")[2] == before
    assert own.stat().st_mode & 0o777 == 0o644, "ssh refuses what others may write to"
    assert in_force(own, "gpu1")["port"] == "77"
    assert in_force(own, "else")["port"] == "5"
    assert sshconfig.exclude(config, own)
    assert own.read_text() == before
    assert not sshconfig.exclude(config, own)


def test_include_inside_a_block_is_moved_to_the_top(tmp_path: Path) -> None:
    config, own = tmp_path / "ssh_config", tmp_path / "config"
    config.write_text("Host gpu1\n  Port 77\n")
    own.write_text(f'Host x\n  Port 5\nInclude "{config}"\n')
    assert sshconfig.include(config, own)
    assert own.read_text() == f'Include "{config}"\nHost x\n  Port 5\n'
    assert in_force(own, "gpu1")["port"] == "77"


def test_include_follows_a_link(tmp_path: Path) -> None:
    real, own = tmp_path / "dotfiles", tmp_path / ".ssh" / "config"
    real.write_text("Host x\n")
    own.parent.mkdir()
    own.symlink_to(real)
    sshconfig.include(tmp_path / "ssh_config", own)
    assert own.is_symlink()
    assert real.read_text().endswith("Host x\n")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ansible_python_interpreter", "{{ lookup('pipe', 'touch canary') }}"),
        ("ansible_python_interpreter", "/usr/bin/python3; touch canary"),
        ("ansible_python_interpreter", ["/usr/bin/python3"]),
        ("ansible_python_interpreter", "relative/python"),
        ("ansible_ssh_common_args", "-o ProxyCommand={{ lookup('pipe', 'touch canary') }}"),
        ("host_address", "{% for x in y %}"),
        ("host_address", "root@h:22\x1b]52;c;eA==\x07"),
        ("host_added", "yesterday\n"),
        ("runner", "podman"),
    ],
)
def test_a_poisoned_entry_is_refused_by_file_host_and_key(
    tmp_path: Path, key: str, value: object
) -> None:
    inventory.write(tmp_path, host("gpu1"), ADDRESS)
    inventory.write(tmp_path, host("gpu2"), ADDRESS)
    file = tmp_path / "hosts.yml"
    raw = inventory.parse(file.read_text())
    raw["gpu_hosts"]["hosts"]["gpu1"][key] = value
    file.write_text(yaml.dump(raw, Dumper=inventory._Dumper, allow_unicode=True))
    for read in (inventory.read, lambda place: inventory.find(place, "gpu1")):
        with pytest.raises(UsageError) as told:
            read(tmp_path)
        said = told.value.message
        assert said.startswith(f"{file}: `gpu1`: {key}: ") and "\n" not in said
        assert "`inv host.remove gpu1`" in told.value.hint
    # The others are not hidden by it, and the remedy works.
    assert inventory.find(tmp_path, "gpu2").python == "/opt/conda/bin/python"
    assert inventory.names(tmp_path) == ("gpu1", "gpu2")
    inventory.remove(tmp_path, "gpu1")
    assert list(inventory.read(tmp_path)) == ["gpu2"]


def test_an_inventory_of_before_is_still_read(tmp_path: Path) -> None:
    inventory.write(tmp_path, host("gpu1"), ADDRESS)
    file = tmp_path / "hosts.yml"
    file.write_text(file.read_text().replace("!unsafe ", ""))
    assert inventory.read(tmp_path)["gpu1"] == host("gpu1")


def test_what_is_written_for_ansible_is_no_template(tmp_path: Path) -> None:
    poisoned = "/x/{{ lookup('pipe', 'touch canary') }}"
    inventory.write(tmp_path, host("gpu1", poisoned), ADDRESS)
    found = inventory.parse((tmp_path / "hosts.yml").read_text())["gpu_hosts"]["hosts"]["gpu1"]
    assert found["ansible_python_interpreter"] == poisoned
    assert all(isinstance(value, inventory.Unsafe) for value in found.values()), found


def test_variables_for_ansible_are_no_templates() -> None:
    text = inventory.variables({"a": "{{ 1 }}", "b": {"c": ["x", True, 1, None]}})
    assert text == "a: !unsafe '{{ 1 }}'\nb:\n  c:\n  - !unsafe 'x'\n  - true\n  - 1\n  - null\n"
