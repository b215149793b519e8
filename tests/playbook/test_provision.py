"""The playbooks, run for real against hosts in folders."""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.playbook.rented import Rented, index
from tests.unit.test_playbook_filters import plugin

pytestmark = pytest.mark.host

Rent = Callable[[str], Rented]

L40 = "550.54.14, 8.9, NVIDIA L40"
TOKEN = "hf_canaryCanaryCanary"


def good(host: Rented, *options: str, **variables: object) -> int:
    """Provision; return how many tasks changed something."""
    played = host.play("provision", *options, **variables)
    assert played.failed == 0, played.text
    return played.changed


@pytest.fixture(scope="module")
def host(rent: Rent) -> Rented:
    """A host that was provisioned once, with everything the command can give."""
    host = rent("provisioned")
    host.variables |= furnish(host)
    assert good(host) > 0
    return host


def furnish(host: Rented) -> dict[str, str]:
    app = host.folder / "app.tar.gz"
    source = host.folder / "job.py"
    source.write_text("here = True\n")
    with tarfile.open(app, "w:gz") as archive:
        archive.add(source, "src/tunesmith/job.py")
    token = host.folder / "token"
    token.write_text(f"{TOKEN}\n")
    record = host.folder / "record.sh"
    record.write_text(
        'grep -qxF -- "$2" "$1/state.json" && exit; echo "$2" >"$1/state.json"; echo recorded\n'
    )
    return {
        "app_archive": str(app),
        "app_digest": hashlib.sha256(app.read_bytes()).hexdigest(),
        "hf_token_file": str(token),
        "record_script": str(record),
        "state_fingerprint": "locks=1",
    }


def test_the_environment_is_the_lock(host: Rented) -> None:
    cli = host.environment / "bin/llamafactory-cli"
    assert "0.9.3" in subprocess.run([cli], capture_output=True, text=True, check=True).stdout
    assert host.marker["flavour"] == "cu128"
    lock = host.folder / "configs/locks/cu128.txt"
    assert host.marker["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    packages = host.environment / "lib/python3.10/site-packages"
    assert not list(packages.glob("uv*")), "uv lies outside"
    made = list(packages.glob("bitsandbytes/__pycache__/*.pyc"))
    assert made, "bytecode is made, of what nothing has imported too"


def test_bytecode_that_cannot_be_made_ends_the_installation(rent: Rent) -> None:
    host = rent("uncompiled")
    broken = host.folder / "bytecode.py"
    broken.write_text("raise SystemExit('no space left')\n")
    failed = host.play("provision", llamafactory_bytecode=str(broken))
    assert failed.failed == 1
    assert re.search(r"no space left\s+the bytecode of \S+ could not be made", failed.text)
    # What is half-made does not count.
    assert good(host) > 0
    assert host.marker["flavour"] == "cu128"


def test_the_index_is_asked_for_a_list_once(rent: Rent, index_url: tuple[Path, str]) -> None:
    host, log = rent("asking"), index_url[0] / "asked"
    before = log.read_text().count("/simple/torch/\n") if log.exists() else 0
    assert good(host) > 0
    assert log.read_text().count("/simple/torch/\n") == before + 1


def test_channels_and_indexes_are_tried_in_order(host: Rented) -> None:
    calls = (host.home / "conda.log").read_text().splitlines()
    made = [call for call in calls if call.startswith("create ")]
    assert [call.partition("--channel ")[2].split()[0] for call in made] == [
        "https://broken.example.com",
        "https://channel.example.com",
    ]
    assert all("--override-channels" in call for call in made)


def test_tunesmith_is_found_by_the_environments_python(host: Rented) -> None:
    argv = [host.environment / "bin/python", "-c", "import tunesmith.job as job; print(job.here)"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "True\n"


def test_every_kind_of_shell_has_the_variables(host: Rented) -> None:
    ask = 'echo "$HF_ENDPOINT $HF_HOME $HF_HUB_DISABLE_XET $HF_TOKEN_PATH"'
    told = f"https://hf.example.com {host.disk}/Hugging-Face 1 {host.base}/token\n"
    assert host.shell("bash", "-l", "-c", ask) == told
    assert host.shell("bash", "-i", "-c", ask) == f"interactive\n{told}"
    assert host.shell("sh", "-c", f'. "{host.base}/env.sh"; {ask}') == told
    # As sshd starts it for a command: not interactive, and .bashrc is read all the same.
    assert host.shell("bash", "--rcfile", "/dev/null", "-c", f'. "$HOME/.bashrc"; {ask}') == told


def test_what_is_ours_is_nobody_elses(host: Rented) -> None:
    for path in (host.base, host.base / "runs", host.base / "data"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for name in ("token", "env.sh", "mirror.yml"):
        assert stat.S_IMODE((host.base / name).stat().st_mode) == 0o600
    assert (host.base / "token").read_text() == f"{TOKEN}\n"


def test_the_data_set_registry_is_there(host: Rented, root: Path) -> None:
    ours = (root / "data/dataset_info.json").read_bytes()
    assert (host.base / "data/dataset_info.json").read_bytes() == ours


def test_a_second_run_looks_and_records_and_that_is_all(host: Rented) -> None:
    """Each task on the host costs an SSH command and a Python: none without need."""
    assert good(host, "--check") == 0
    played = host.play("provision", "-v")
    assert (played.changed, played.failed) == (0, 0), played.text
    done = re.findall(r"^TASK \[(?:\w+ : )?(.+)\] \*+\n(?=ok|changed)", played.text, re.MULTILINE)
    on_the_host = [
        name for name in done if not re.match(r"(Look \| Read|Refuse|Decide|Validating) ", name)
    ]
    assert on_the_host == [
        "Look | Ask the host what it is and what it has",
        "Store the token",
        "Record the state",
    ]


def test_a_proxy_and_authorities_reach_shells_and_jobs(host: Rented) -> None:
    file = Path(host.variables["mirror_file"])
    before = file.read_text()
    mirror = yaml.safe_load(before) | {"http_proxy": "http://10.0.0.1:3128"}
    bundle = host.folder / "ca.pem"
    bundle.write_text("certificates")
    file.write_text(yaml.safe_dump(mirror | {"ca_bundle": str(bundle)}))
    assert good(host) == 3
    assert (host.base / "ca.pem").read_text() == "certificates"
    profile = yaml.safe_load((host.base / "mirror.yml").read_text())
    assert profile == mirror | {"ca_bundle": f"{host.base}/ca.pem"}
    ask = 'echo "$https_proxy $no_proxy $SSL_CERT_FILE $REQUESTS_CA_BUNDLE"'
    told = f"http://10.0.0.1:3128 localhost,127.0.0.1,::1 {host.base}/ca.pem {host.base}/ca.pem\n"
    assert host.shell("bash", "-l", "-c", ask) == told
    file.write_text(before)
    assert good(host) == 2


def test_an_nvcc_is_given_or_found(host: Rented) -> None:
    ask = 'echo "$CUDA_HOME"; "$CUDA_HOME/bin/nvcc"'
    assert good(host, cuda_toolkit=True) == 2
    told = host.shell("bash", "-l", "-c", ask)
    assert told.splitlines()[0] == f"{host.base}/cuda-12.8"
    assert "release 12.8" in told
    found = {"12.4": "/opt/of-the-image", "13.0": "/opt/too-new"}
    assert good(host, cuda_toolkit=True, cuda_toolkit_found=found) == 1
    assert "/opt/of-the-image" in (host.base / "env.sh").read_text()
    assert good(host) == 1
    assert "CUDA_HOME" not in (host.base / "env.sh").read_text()


def test_files_that_were_edited_are_mended(host: Rented) -> None:
    (host.base / "env.sh").write_text("export HF_HOME=/elsewhere\n")
    (host.home / ".bashrc").write_text("echo mine\n")
    (host.home / ".condarc").unlink()
    registry = host.base / "data/dataset_info.json"
    registry.write_text('{"mine": {}}')
    assert good(host) == 3
    assert (host.home / ".bashrc").read_text().startswith("# BEGIN tunesmith")
    assert (host.home / ".bashrc").read_text().endswith("\necho mine\n")
    assert registry.read_text() == '{"mine": {}}', "the user's"


def test_an_environment_that_was_not_finished_is_made_again(host: Rented) -> None:
    (host.environment / ".tunesmith-environment.json").unlink()
    for mark in host.environment.glob(".tunesmith-installed-*"):
        mark.unlink()
    (host.environment / "left-over").touch()
    assert good(host) > 0
    assert not (host.environment / "left-over").exists()
    assert list(host.environment.glob("lib/*/site-packages/tunesmith.pth"))


def test_an_environment_in_use_is_not_replaced(host: Rented) -> None:
    own = host.environment / "bin/sleeper"
    own.write_bytes(Path("/bin/sleep").read_bytes())
    own.chmod(0o755)
    lock = host.folder / "configs/locks/cu128.txt"
    before = lock.read_text()
    with subprocess.Popen([own, "600"]) as run:
        lock.write_text(before + "# another\n")
        played = host.play("provision")
        assert played.failed == 1
        assert f"processes run out of it ({run.pid})" in " ".join(played.text.split())
        assert own.exists()
        reset = host.play("reset")
        assert (reset.failed, reset.changed) == (1, 0)
        run.kill()
    lock.write_text(before)
    own.unlink()


def test_a_new_lock_replaces_the_environment(host: Rented) -> None:
    lock = host.folder / "configs/locks/cu128.txt"
    lock.write_text(lock.read_text() + "# another\n")
    assert good(host) > 0
    assert host.marker["lock_sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert good(host) == 0


def test_a_run_waits_for_the_installation_that_a_killed_one_left(host: Rented) -> None:
    for lock in (".lock", ".fetch.lock"):
        began = time.monotonic()
        with subprocess.Popen(["flock", host.base / lock, "sleep", "4"]):
            time.sleep(0.5)
            assert good(host) == 0
        assert time.monotonic() - began > 4


def test_a_flavour_that_fails_its_self_test_gives_way_to_the_other(rent: Rent) -> None:
    host = rent("fallback")
    host.gpus(L40)
    # A folder that the user made before us: it has a registry, so it is left alone.
    (host.base / "data").mkdir(parents=True)
    (host.base / "data/dataset_info.json").write_text('{"mine": {}}')
    assert good(host) > 0
    assert [path.name for path in (host.base / "data").iterdir()] == ["dataset_info.json"]
    assert (host.base / "data/dataset_info.json").read_text() == '{"mine": {}}'
    assert (host.marker["flavour"], host.marker["self_test"]) == ("cu126", L40)
    assert "550.54.14" in host.marker["refused"]
    made = host.conda_calls("create")
    # What was learned is kept: with and without the GPU nothing is made again.
    host.gpus()
    assert good(host) == 0
    host.gpus(L40)
    assert good(host) == 0
    assert host.conda_calls("create") == made


def test_a_failed_self_test_without_another_flavour_is_an_error(rent: Rent) -> None:
    host = rent("failing")
    host.gpus(L40.replace("550.54.14", "580.65.06"))
    played = host.play("provision")
    assert played.failed == 1
    said = " ".join(played.text.split())
    assert "cu128 is installed and does not run on the GPU: torch sees no GPU" in said
    assert not (host.environment / ".tunesmith-environment.json").exists()


def test_what_cannot_run_is_refused_before_anything_is_changed(rent: Rent) -> None:
    host = rent("refused")
    host.gpus("470.82.01, 8.0, NVIDIA A100")
    played = host.play("provision")
    assert played.failed == 1
    assert "driver 470.82.01 is too old" in " ".join(played.text.split())
    host.gpus()
    # All that is wrong is told at once.
    ill = {
        "preflight_architecture": "riscv64",
        "preflight_minimum_glibc": "9.9",
        "preflight_free_bytes": 10**17,
        "preflight_free_inodes": 10**12,
        "preflight_clock_skew_seconds": -1,
    }
    told = ("the locks are for riscv64", "too old, the locks need 9.9", "more files")
    told += ("free, the environment needs", "its clock is")
    for variables, words in (
        (ill, told),
        ({"preflight_host": unwritable(host)}, ("cannot be written by this user",)),
        ({"cuda_flavour": "cu99"}, ("flavour 'cu99' is unknown",)),
    ):
        played = host.play("provision", **variables)
        assert (played.failed, played.changed) == (1, 0), variables
        for word in words:
            assert word in " ".join(played.text.split()), variables
    assert not host.base.exists()
    assert host.conda_calls("create") == 0


def unwritable(host: Rented) -> dict[str, object]:
    """What the probe tells a user who may write nowhere."""
    printed = host.probe("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    facts = plugin(host.root, "host").host_facts(printed, "llama-factory", ["flock", "tar"])
    assert not facts["writable"]
    return facts | {"gpu": []}


def test_check_mode_tells_and_changes_nothing(rent: Rent) -> None:
    host = rent("checked")
    host.variables |= furnish(host)
    before = sorted(host.home.iterdir())
    assert good(host, "--check", "--diff") > 3
    assert not host.base.exists()
    # Ansible's own, of the machine one sits at, which has the same home here, and what the
    # stand-in for conda writes when the probe asks it for its version.
    made = {host.home / ".ansible", host.home / "conda.log"}
    assert set(host.home.iterdir()) == {*before, *made}
    assert set((host.home / "conda.log").read_text().split()) == {"--version"}
    assert "tunesmith" not in (host.home / ".bashrc").read_text()


def test_miniforge_comes_from_the_first_address_that_has_the_right_one(rent: Rent) -> None:
    host = rent("miniforge")
    conda = host.home / "miniconda3/bin/conda"
    installer = (
        f'mkdir -p "$3/bin" "$3/etc/profile.d" && cp \'{host.folder}/conda\' "$3/bin/conda"'
        " && echo 'conda_hook=1' >\"$3/etc/profile.d/conda.sh\"\n"
    )
    (host.folder / "conda").write_text(
        conda.read_text().replace("case $1 in", 'case $1 in\n--version) echo "conda 0" ;;')
    )
    (host.folder / "conda").chmod(0o755)
    (host.home / "miniconda3").rename(host.folder / "no-conda")
    stack = yaml.safe_load((host.folder / "configs/stack.yml").read_text())
    stack["conda"]["sha256"] = hashlib.sha256(installer.encode()).hexdigest()
    (host.folder / "configs/stack.yml").write_text(yaml.safe_dump(stack))
    version = stack["conda"]["version"]
    for name, text in (("wrong", "exit 1\n"), ("right", installer)):
        folder = host.folder / "mirror" / name / version
        folder.mkdir(parents=True)
        (folder / f"Miniforge3-{version}-Linux-x86_64.sh").write_text(text)
    with index(host.folder / "mirror") as url:
        mirror = yaml.safe_load((host.folder / "configs/mirror.yml").read_text())
        top = url.removesuffix("/simple")
        mirror["miniforge_urls"] = [f"{top}/absent", f"{top}/wrong/{{version}}"]
        (host.folder / "configs/mirror.yml").write_text(yaml.safe_dump(mirror))
        played = host.play("provision")
        assert played.failed == 1
        assert "with the sha256 of stack.yml" in " ".join(played.text.split())
        assert not (host.base / "miniforge3").exists()
        mirror["miniforge_urls"] += [f"{top}/right/{version}"]
        (host.folder / "configs/mirror.yml").write_text(yaml.safe_dump(mirror))
        # One that a crash left half-made is not taken for conda.
        (host.base / "miniforge3/bin").mkdir(parents=True)
        (host.base / "miniforge3/bin/conda").touch(0o755)
        assert good(host) > 0
    assert host.shell("bash", "-l", "-c", 'echo "$conda_hook"') == "1\n"
    assert good(host) == 0
    reset = host.play("reset")
    assert reset.failed == 0, reset.text
    assert not (host.base / "miniforge3").exists()
    assert not (host.home / ".condarc").exists()


def test_reset_leaves_what_is_the_users(host: Rented) -> None:
    precious = [host.base / name / "mine" for name in ("data", "models", "runs")]
    precious.append(host.disk / "Hugging-Face" / "model")
    for file in precious:
        file.write_text("mine")
    assert host.play("reset").failed == 0
    assert all(file.read_text() == "mine" for file in precious)
    left = {path.name for path in host.base.iterdir()}
    assert left == {"data", "models", "runs"}
    assert (host.home / ".bashrc").read_text() == "echo mine\n"
    assert not (host.home / ".condarc").exists()
    again = host.play("reset")
    assert (again.failed, again.changed) == (0, 0), again.text


def test_extras_are_added_and_kept(rent: Rent) -> None:
    host = rent("extras")
    packages = host.environment / "lib/python3.10/site-packages"
    assert good(host, with_extras={"gpu1": ["galore"]}) > 0
    assert list(host.marker["extras"]) == ["galore"]
    assert (packages / "galore.py").is_file()
    # Nothing asked for: what is there stays.
    assert good(host) == 0
    assert good(host, with_extras={"gpu1": ["galore", "badam"]}) > 0
    assert (packages / "badam.py").is_file()
    assert sorted(host.marker["extras"]) == ["badam", "galore"]
    assert good(host, with_extras={"gpu1": ["badam"]}) == 0
    # An environment that is made again gets them again.
    lock = host.folder / "configs/locks/cu128.txt"
    lock.write_text(f"# another\n{lock.read_text()}")
    assert good(host) > 0
    assert sorted(host.marker["extras"]) == ["badam", "galore"]
    assert (packages / "badam.py").is_file()


def test_extras_that_the_disk_cannot_hold_are_refused_first(rent: Rent) -> None:
    host = rent("full")
    assert good(host) > 0
    failed = host.play("provision", with_extras={"gpu1": ["galore"]}, preflight_added_bytes=10**16)
    assert failed.failed == 1
    assert "the extras need" in failed.text
    assert "extras" not in host.marker or host.marker["extras"] == {}
