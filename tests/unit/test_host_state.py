"""What the probe finds and record.sh records, for real in folders that look like a provisioned
host, and its reading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from support import lacking
from tunesmith.basemodel import store as model_store
from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.store import ModelFolder
from tunesmith.core.mirrors import load_mirror
from tunesmith.hosts.probe.answer import Answer, TruncatedError
from tunesmith.hosts.probe.script import ProbeSettings, script
from tunesmith.project import Project
from tunesmith.provision.drift import (
    SECTIONS,
    State,
    check_states,
    fingerprint,
    record_script,
    roles_digest,
    state_of,
    wanted_of,
)
from tunesmith.stack import sources

pytestmark = pytest.mark.unit
every_shell = pytest.mark.parametrize("host", ["dash", "busybox"], indirect=True)

WANTED = {"app": "a1", "flavour": "auto", "mirror": "cn:m1", "stack": "s1"}
SITE = "envs/llama-factory/lib/python3.10/site-packages"


@dataclasses.dataclass
class FakeHost:
    """A home, a data disk and programs of its own, and our scripts run in them by a real shell."""

    root: Path
    shell: tuple[str, ...]

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    @property
    def base(self) -> Path:
        return self.disk / "tunesmith"

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Feed a script to the shell's stdin, as ssh does."""
        return subprocess.run(
            [*self.shell, "-s", "--", *arguments],
            input=script,
            env={"HOME": str(self.home), "PATH": f"{self.root}/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    def record(self, wanted: dict[str, str] = WANTED) -> str:
        done = self.run(record_script(), str(self.base), fingerprint(wanted))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def probe(self) -> str:
        settings = ProbeSettings(disks=("/nowhere", str(self.disk)))
        done = self.run(script([section.SECTION for section in SECTIONS], settings))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def check(self, wanted: dict[str, str] = WANTED) -> State:
        return state_of(Answer(self.probe(), "gpu1", SECTIONS), wanted)

    def program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        path.chmod(0o755)


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> FakeHost:
    """A host as provisioning leaves it, recorded as good."""
    shell = getattr(request, "param", "dash")
    if not shutil.which(shell):
        lacking(f"no {shell}", f"`apt-get install {shell}` enables this test")
    fake = FakeHost(tmp_path, ("busybox", "sh") if shell == "busybox" else (shell,))
    for folder in ("bin", "home", f"disk/tunesmith/{SITE}"):
        (tmp_path / folder).mkdir(parents=True)
    if shell == "busybox":
        # All of its programs, as on a host that has no others.
        subprocess.run(["busybox", "--install", "-s", tmp_path / "bin"], check=True)
    fake.program("nvidia-smi", "echo '570.124.06, NVIDIA GeForce RTX 4090'")
    environment = fake.base / "envs/llama-factory"
    for package in ("torch", "peft"):
        for file in ("__init__.py", "core/a.py", "core/__pycache__/a.cpython-310.pyc"):
            path = fake.base / SITE / package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {package} {file}\n", encoding="utf-8")
        record = fake.base / SITE / f"{package}-1.0.dist-info" / "RECORD"
        record.parent.mkdir()
        record.write_text("x\n", encoding="utf-8")
    (fake.base / SITE / "six.py").write_text("# six\n", encoding="utf-8")
    (environment / "lib/python3.10/os.py").write_text("# os\n", encoding="utf-8")
    (environment / "bin").mkdir()
    (environment / "bin/python").write_text("#!/bin/sh\necho Python 3.10.13\n", encoding="utf-8")
    (environment / "bin/python").chmod(0o755)
    (environment / "bin/uvicorn").write_text("#ours", encoding="utf-8")
    (fake.base / SITE / "nvidia/cublas").mkdir(parents=True)
    (fake.base / SITE / "nvidia/cublas/lib.so").write_text("x", encoding="utf-8")
    conda = tmp_path / "bin" / "conda"
    fake.program("conda", "exit 0")
    (environment / "conda-meta").mkdir()
    (environment / "conda-meta/history").write_text(
        f"==> now <==\n# cmd: {conda} create --yes --prefix x\n", encoding="utf-8"
    )
    app = fake.base / "app/0123456789abcdef/src/tunesmith"
    app.mkdir(parents=True)
    (app / "words.py").write_text("# words\n", encoding="utf-8")
    (fake.base / "env.sh").write_text("export HF_HOME=/x\n", encoding="utf-8")
    (fake.home / ".bashrc").write_text(
        "# BEGIN tunesmith (inv provision)\nif [ -r env.sh ]; then . env.sh; fi\n"
        "# END tunesmith (inv provision)\ncase $- in *i*) ;; *) return ;; esac\n",
        encoding="utf-8",
    )
    (fake.home / ".condarc").write_text(f"envs_dirs:\n  - {fake.base}/envs\n", encoding="utf-8")
    assert fake.record() == "recorded"
    return fake


@every_shell
def test_a_host_nobody_touched_is_in_state(host: FakeHost) -> None:
    state = host.check()
    assert state == State("gpu1", str(host.base), ())
    assert state.in_state


@every_shell
def test_recording_again_says_same_and_writes_nothing(host: FakeHost) -> None:
    before = (host.base / "state.json").stat()
    assert host.record() == "same"
    after = (host.base / "state.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert stat.S_IMODE(after.st_mode) == 0o600
    assert host.record({**WANTED, "app": "a2"}) == "recorded"
    assert [path.name for path in host.base.glob(".state*")] == []


def test_checking_changes_nothing(host: FakeHost) -> None:
    def listed() -> list[tuple[str, int, int]]:
        found = [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in host.root.rglob("*")]
        return sorted(found)

    before = listed()
    host.check()
    assert listed() == before


def remove_package(host: FakeHost) -> None:
    shutil.rmtree(host.base / SITE / "peft")
    shutil.rmtree(host.base / SITE / "peft-1.0.dist-info")


def remove_only_its_metadata(host: FakeHost) -> None:
    shutil.rmtree(host.base / SITE / "peft-1.0.dist-info")


def change_python(host: FakeHost) -> None:
    python = host.base / "envs/llama-factory/bin/python"
    python.write_text("#!/bin/sh\necho Python 3.10.14\n", encoding="utf-8")


def link_python_elsewhere(host: FakeHost) -> None:
    python = host.base / "envs/llama-factory/bin/python"
    python.unlink()
    python.symlink_to("/bin/sh")


def edit_variables(host: FakeHost) -> None:
    with (host.base / "env.sh").open("a") as stream:
        stream.write("export HF_HOME=/elsewhere\n")


def truncate_file(host: FakeHost) -> None:
    os.truncate(host.base / SITE / "torch/core/a.py", 3)


def truncate_module(host: FakeHost) -> None:
    os.truncate(host.base / SITE / "six.py", 0)


def edit_same_size(host: FakeHost) -> None:
    path = host.base / SITE / "torch/core/a.py"
    text = path.read_text(encoding="utf-8").replace("torch", "tosch")
    path.write_text(text, encoding="utf-8")
    os.utime(path, (1, path.stat().st_mtime + 1))


def replace_program(host: FakeHost) -> None:
    (host.base / "envs/llama-factory/bin/uvicorn").write_text("#mine\n\n", encoding="utf-8")


def add_to_package(host: FakeHost) -> None:
    (host.base / SITE / "torch/mine.py").write_text("", encoding="utf-8")


def edit_standard_library(host: FakeHost) -> None:
    (host.base / "envs/llama-factory/lib/python3.10/os.py").write_text("# longer os\n")


def edit_app(host: FakeHost) -> None:
    (host.base / "app/0123456789abcdef/src/tunesmith/project.py").write_text("# other words\n")


def remove_environment(host: FakeHost) -> None:
    shutil.rmtree(host.base / "envs")


def change_driver(host: FakeHost) -> None:
    host.program("nvidia-smi", "echo '535.1, Tesla T4'")


def lose_gpu(host: FakeHost) -> None:
    host.program("nvidia-smi", "echo 'No devices were found'; exit 6")


def reset_system_disk(host: FakeHost) -> None:
    (host.home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\n", encoding="utf-8")
    (host.home / ".condarc").unlink()


def edit_our_block(host: FakeHost) -> None:
    path = host.home / ".bashrc"
    path.write_text(path.read_text(encoding="utf-8").replace("-r env.sh", "-e x"), encoding="utf-8")


def remove_conda(host: FakeHost) -> None:
    (host.root / "bin/conda").unlink()


SEEDED: list[tuple[Callable[[FakeHost], None], list[str], tuple[str, ...]]] = [
    (
        remove_package,
        [f"{SITE}/peft-1.0.dist-info: is gone", f"{SITE}/peft: is gone"],
        ("environment",),
    ),
    (remove_only_its_metadata, [f"{SITE}/peft-1.0.dist-info: is gone"], ("environment",)),
    (change_python, ["Python 3.10.13", "Python 3.10.14"], ("environment",)),
    (link_python_elsewhere, ["envs/llama-factory/bin/python: Python 3.10.13"], ("environment",)),
    (edit_variables, ["env.sh was edited"], ()),
    (truncate_file, [f"{SITE}/torch: 38 B -> 23 B (-15 bytes)"], ("environment",)),
    (truncate_module, [f"{SITE}/six.py: 6 B -> 0 B (-6 bytes)"], ("environment",)),
    (edit_same_size, [f"{SITE}/torch: a file was rewritten"], ("environment",)),
    (replace_program, ["envs/llama-factory/bin/uvicorn: 5 B -> 7 B"], ("environment",)),
    (add_to_package, [f"{SITE}/torch: 2 files -> 3 files"], ("environment",)),
    (edit_standard_library, ["envs/llama-factory/lib/python3.10: "], ("environment",)),
    (edit_app, ["app/0123456789abcdef: "], ("app",)),
    (remove_environment, [f"{SITE}/torch: is gone", "-> not there"], ("environment",)),
    (change_driver, ["GPU: 570.124.06, NVIDIA GeForce RTX 4090 -> 535.1, Tesla T4"], ()),
    (lose_gpu, ["GPU: 570.124.06, NVIDIA GeForce RTX 4090 -> none"], ()),
    (reset_system_disk, [".bashrc: our part is gone", ".condarc: our part is gone"], ()),
    (edit_our_block, [".bashrc: our part was edited"], ()),
    (remove_conda, ["conda: ", "-> not there"], ()),
]


@every_shell
@pytest.mark.parametrize(
    ("seed", "words", "distrusted"), SEEDED, ids=[s[0].__name__ for s in SEEDED]
)
def test_seeded_drift_is_named(
    host: FakeHost,
    seed: Callable[[FakeHost], None],
    words: list[str],
    distrusted: tuple[str, ...],
) -> None:
    seed(host)
    state = host.check()
    assert not state.in_state
    told = "\n".join(state.drift)
    for word in words:
        assert word in told, told
    assert state.distrusted == distrusted
    # Only what was done is told, and once the host is good again it is in state again.
    assert len(state.drift) <= 12, told
    assert host.record() == "recorded"
    assert host.check().in_state


@every_shell
@pytest.mark.parametrize("beside", [True, False], ids=["in the store", "in the hub's cache"])
def test_a_model_that_is_not_whole_is_named(host: FakeHost, beside: bool) -> None:
    entry = host.base / "models/some--model@main"
    folder = entry if beside else host.root / "hub's cache"
    sizes = {"config.json": 2, "model.safetensors": 1000}
    for path in {entry, folder}:
        path.mkdir(parents=True)
    for name, size in sizes.items():
        (folder / name).write_bytes(b"x" * size)
    files = {
        name: FileRecord(size, hashlib.sha256(b"x" * size).hexdigest())
        for name, size in sizes.items()
    }
    model = ModelFolder("some/model", folder, "here", "r1", files, fetched=True)
    model_store.record(entry, model, None)
    assert host.check().in_state, "a whole one changes nothing"
    os.truncate(folder / "model.safetensors", 999)
    told = "base model some--model@main/model.safetensors: 999 of 1000 bytes; a training with it"
    (line,) = host.check().drift
    assert line.startswith(told)
    assert host.check().distrusted == ()
    assert host.record() == "same", "what is broken is never recorded as good"
    (folder / "model.safetensors").unlink()
    assert "0 of 1000 bytes" in host.check().drift[0]


@every_shell
def test_what_a_user_adds_is_no_drift(host: FakeHost) -> None:
    """As `pip install` and `conda install` leave it, and a package in a shared folder."""
    environment = host.base / "envs/llama-factory"
    for file in ("extra/__init__.py", "extra-1.dist-info/RECORD", "mine.py", "nvidia/own/a.so"):
        path = host.base / SITE / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine\n", encoding="utf-8")
    (environment / "bin/extra").write_text("mine\n", encoding="utf-8")
    (environment / "lib/libmine.so").write_text("mine\n", encoding="utf-8")
    (environment / "conda-meta/mine-1.json").write_text("{}\n", encoding="utf-8")
    with (environment / "conda-meta/history").open("a", encoding="utf-8") as history:
        history.write("# cmd: conda install mine\n")
    assert host.check().in_state


@every_shell
def test_a_base_elsewhere_is_found_by_the_start_files(host: FakeHost) -> None:
    elsewhere = host.root / "my disk/of mine"
    elsewhere.parent.mkdir()
    host.base.rename(elsewhere)
    file = f"'{elsewhere}/env.sh'"
    (host.home / ".bashrc").write_text(
        f"# BEGIN tunesmith (inv provision)\nif [ -r {file} ]; then . {file}; fi\n"
        "# END tunesmith (inv provision)\n",
        encoding="utf-8",
    )
    done = host.run(record_script(), str(elsewhere), fingerprint(WANTED))
    assert done.stdout == "recorded\n", done.stderr
    state = host.check()
    assert (state.base, state.in_state) == (str(elsewhere), True)


@pytest.mark.parametrize(
    "file",
    ["torch/core/__pycache__/b.cpython-310.pyc", "torch/core/__pycache__/b.nbi"],
)
def test_what_running_leaves_behind_is_no_drift(host: FakeHost, file: str) -> None:
    (host.base / SITE / file).write_text("new", encoding="utf-8")
    (host.base / SITE / "torch/hash_seed.txt").write_text("seed", encoding="utf-8")
    (host.home / ".bashrc").open("a").write("alias ll='ls -l'\n")
    assert host.check().in_state


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        ("app", "a2", "tunesmith's own sources have changed"),
        ("flavour", "cu126", "flavour: provisioned with auto, now cu126 is asked for"),
        ("mirror", "default:m2", "mirror: provisioned with cn, now default is asked for"),
        ("mirror", "cn:m2", "the mirror profile cn has changed"),
        ("stack", "s2", "configs/stack.yml has changed"),
        ("roles", "r1", "the Ansible roles have changed"),
    ],
)
def test_another_fingerprint_is_named(host: FakeHost, part: str, value: str, told: str) -> None:
    state = host.check({**WANTED, part: value})
    assert state.drift == (told,)
    assert state.distrusted == ()


def test_no_state_at_all(host: FakeHost) -> None:
    (host.base / "state.json").unlink()
    state = host.check()
    assert (state.base, state.in_state) == (None, False)
    assert "never provisioned" in state.drift[0]


@pytest.mark.parametrize("text", ["", '{"format": 1, "fing', "[]", '{"fingerprint": 3}'])
def test_a_damaged_state_is_not_trusted(host: FakeHost, text: str) -> None:
    (host.base / "state.json").write_text(text, encoding="utf-8")
    state = host.check()
    assert state.drift == (f"{host.base}/state.json is damaged",)
    assert state.distrusted == ("environment", "app")


def test_the_home_folder_is_the_last_disk(host: FakeHost) -> None:
    shutil.copytree(host.base, host.home / "tunesmith", symlinks=True)
    assert host.check().base == str(host.base)
    (host.base / "state.json").unlink()
    assert host.check().base == str(host.home / "tunesmith")


def test_a_find_that_cannot_print_finds_the_same(host: FakeHost) -> None:
    """As on systems whose find is busybox's: then stat prints."""
    found = host.check()
    assert found.in_state
    host.program("find", 'case " $* " in *" -printf "*) exit 1 ;; esac; exec /usr/bin/find "$@"')
    assert host.check() == found


def test_chatter_before_the_answer_is_skipped_and_a_cut_answer_is_not_good(host: FakeHost) -> None:
    answer = host.probe()
    assert state_of(Answer(f"Welcome!\n{answer}", "gpu1", SECTIONS), WANTED).in_state
    for length in range(0, len(answer) - 9, 97):
        with pytest.raises(TruncatedError):
            Answer(answer[:length], "gpu1", SECTIONS)


def test_a_state_that_cannot_be_written_is_an_error(host: FakeHost) -> None:
    done = host.run(record_script(), str(host.root / "absent"), "x=1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such folder" in done.stderr
    (host.base / "state.json").unlink()
    (host.base / "state.json").mkdir()
    (host.base / "state.json/x").touch()
    host.program("mv", "exit 1")
    done = host.run(record_script(), str(host.base), "x=1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "could not be written" in done.stderr
    assert [path.name for path in host.base.glob(".state*")] == []


@pytest.mark.parametrize("arguments", [(), ("x",), ("", "x")])
def test_misuse_of_the_script(host: FakeHost, arguments: tuple[str, ...]) -> None:
    assert host.run(record_script(), *arguments).returncode != 0


def test_odd_names_stay_one_line_of_json(host: FakeHost) -> None:
    (host.base / SITE / 'we"ird\\na\tme').mkdir()
    (host.base / SITE / 'we"ird\\na\tme' / "x").touch()
    host.record()
    recorded = json.loads((host.base / "state.json").read_text(encoding="utf-8"))
    assert any('we"ird\\name' in line for line in recorded["found"])
    assert host.check().in_state


def test_what_is_wanted_changes_with_each_of_its_sources(root: Path, tmp_path: Path) -> None:
    for name in ("configs", "ansible", "src"):
        shutil.copytree(
            root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "inventory")
        )
    shutil.copy(root / "pyproject.toml", tmp_path)

    def wanted(mirror: str = "default", **asked: object) -> dict[str, str]:
        sources.app_tar.cache_clear()
        project = Project(tmp_path, tmp_path / "home")
        profile = load_mirror(mirror, tmp_path / "configs/mirrors")
        return wanted_of(project, profile, **asked)  # type: ignore[arg-type]

    before = wanted()
    assert before == wanted()

    def differs(now: dict[str, str]) -> set[str]:
        return {key for key in now if now[key] != before[key]}

    assert differs(wanted("cn")) == {"mirror"}
    assert differs(wanted(flavour="cu126")) == {"flavour"}
    assert differs(wanted(toolkit=True)) == {"toolkit"}
    for file, part in [
        ("configs/locks/cu126.txt", {"locks"}),
        ("configs/locks/build-constraints.txt", {"locks"}),
        ("configs/stack.yml", {"stack"}),
        ("src/tunesmith/job/supervisor/worker.py", {"app"}),
        ("src/tunesmith/report/sections.py", set()),
        ("ansible/ansible.cfg", {"roles"}),
    ]:
        text = (tmp_path / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(f"{text}\n# more\n", encoding="utf-8")
        assert differs(wanted()) == part, file
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert differs(wanted()) == set()


def test_a_private_authority_counts_by_its_content(root: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    text = (root / "configs/mirrors/default.yml").read_text(encoding="utf-8")
    own = tmp_path / "my own, mirror.yml"
    own.write_text(f"{text}\nca_bundle: {bundle}\n", encoding="utf-8")
    found = []
    for content in ("one", "two"):
        bundle.write_text(content, encoding="utf-8")
        found.append(wanted_of(Project.at(root), load_mirror(str(own), tmp_path))["mirror"])
    assert found[0] != found[1]
    assert found[0].startswith("my-own-mirror:")


def test_the_inventory_and_bytecode_are_no_roles(tmp_path: Path) -> None:
    (tmp_path / "ansible/roles/a").mkdir(parents=True)
    (tmp_path / "ansible/roles/a/main.yml").write_text("x", encoding="utf-8")
    before = roles_digest(tmp_path)
    for name in ("inventory/hosts.yml", "plugins/__pycache__/x.pyc"):
        (tmp_path / "ansible" / name).parent.mkdir(parents=True)
        (tmp_path / "ansible" / name).write_text("x", encoding="utf-8")
    assert roles_digest(tmp_path) == before
    (tmp_path / "ansible/roles/a/main.yml").rename(tmp_path / "ansible/roles/a/other.yml")
    assert roles_digest(tmp_path) != before


def copy_of_sources(root: Path, target: Path) -> Path:
    for name in ("src/tunesmith", "configs/mirrors"):
        shutil.copytree(root / name, target / name)
    shutil.copy(root / "pyproject.toml", target)
    shutil.copy(root / "configs/models.yml", target / "configs")
    return target


def test_the_archive_of_one_tree_is_one_file(root: Path, tmp_path: Path) -> None:
    trees = [copy_of_sources(root, tmp_path / name) for name in ("one", "two")]
    # Other times, modes and leftovers; the same sources.
    changed = trees[1] / "src/tunesmith/core/files.py"
    changed.chmod(0o755)
    os.utime(changed, (1, 1))
    for leftover in ("__pycache__/x.cpython-311.pyc", ".words.py.swp", "words.py~"):
        path = trees[1] / "src/tunesmith" / leftover
        path.parent.mkdir(exist_ok=True)
        path.write_text("left over", encoding="utf-8")
    archives = []
    for tree in trees:
        path = tmp_path / f"{tree.name}.tar.gz"
        sources.write_app_archive(tree, path)
        archives.append(path.read_bytes())
    assert archives[0] == archives[1]
    assert sources.app_digest(trees[0]) == sources.app_digest(trees[1])
    assert sources.app_digest(trees[0]) == hashlib.sha256(sources.app_tar(trees[0])).hexdigest()
    with tarfile.open(tmp_path / "one.tar.gz") as archive:
        names = archive.getnames()
        owners = {(entry.uid, entry.gid, entry.mtime, entry.mode) for entry in archive}
    assert owners == {(0, 0, 0, 0o644)}
    assert {
        "src/tunesmith/job/supervisor/worker.py",
        "src/tunesmith/py.typed",
    } <= set(names)
    assert {"configs/models.yml", "configs/mirrors/cn.yml"} <= set(names)
    assert not [name for name in names if "pycache" in name or "~" in name or ".swp" in name]


def test_another_tree_is_another_archive(root: Path, tmp_path: Path) -> None:
    one = copy_of_sources(root, tmp_path / "one")
    two = copy_of_sources(root, tmp_path / "two")
    with (two / "src/tunesmith/core/files.py").open("a") as stream:
        stream.write("\n")
    assert sources.app_digest(one) != sources.app_digest(two)


def test_an_unknown_host_is_told_before_any_is_asked(root: Path, tmp_path: Path) -> None:
    from tunesmith.core.errors import UsageError

    project = dataclasses.replace(Project.at(root), home=tmp_path)
    with pytest.raises(UsageError, match="no host 'nobody'"):
        check_states(project, ["nobody"], WANTED)
