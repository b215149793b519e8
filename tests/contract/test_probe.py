"""The one probe of a host: shell text and dataclasses belong together, and nothing else looks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.test_doctor_probe import shells
from tests.contract.test_facts_once import lines
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts.probe import gpu, host, installed, software
from tunesmith.hosts.probe.answer import Answer, Section, TruncatedError
from tunesmith.hosts.probe.gpu import Gpus
from tunesmith.hosts.probe.host import Places, User
from tunesmith.hosts.probe.installed import Environments, Findings, Provisioned
from tunesmith.hosts.probe.script import ProbeSettings, script, with_places

pytestmark = pytest.mark.contract

SECTIONS: tuple[type[Section], ...] = tuple(
    value
    for module in (gpu, host, installed, software)
    for value in vars(module).values()
    if isinstance(value, type) and hasattr(value, "SECTION") and value.__module__ == module.__name__
)
ALL = script(
    [section.SECTION for section in SECTIONS],
    ProbeSettings(environment="own", programs=("sh", "sed"), urls=(("hf", "http://127.0.0.1:9/"),)),
)
# What tells that shell text looks at a host, in which one file it may stand.
LOOKS = {
    r"\bdf \"?-P": "common.sh",
    r"\$HOME/miniconda3\"": "common.sh",
    r"/proc/mounts": ("host.sh", "places.sh"),
    r"/tunesmith/state\.json": "places.sh",
    r"--query-(?:gpu|compute-apps)=\w": ("findings.sh", "gpu.sh"),
    r"/nvidia-smi\b": "gpu.sh",
    r"docker version": "software.sh",
    r"getconf GNU_LIBC": "host.sh",
    r"CONDA_EXE": "common.sh",
    r"sudo -n true": "host.sh",
}


def test_sections_keys_and_functions_are_the_same_ones() -> None:
    names = [section.SECTION for section in SECTIONS]
    assert len(names) == len(set(names)) > 15
    assert sorted(re.findall(r"^section_(\w+)\(\)", ALL, re.MULTILINE)) == sorted(names)
    keys = [key for section in SECTIONS for key in section.SHAPES]
    assert len(keys) == len(set(keys)), "a key belongs to one section"
    said = set(re.findall(r"\b(?:say|lines|disk) ([a-z][\w.]*)", ALL))
    assert said - {"tunesmith_probe", "end"} == set(keys)


def test_the_whole_script_is_clean() -> None:
    """Each file alone cannot tell shellcheck which variables another one sets."""
    argv = [str(Path(sys.executable).with_name("shellcheck")), "-s", "sh", "-f", "json", "-"]
    done = subprocess.run(argv, input=ALL, capture_output=True, text=True, check=False)
    found = {(note["code"], note["message"].split()[0]) for note in json.loads(done.stdout)}
    # `value` is set by eval, and env.sh is a host's.
    assert found <= {(2154, "value"), (1091, "Not")}, found


def test_nothing_else_looks_at_a_host(root: Path) -> None:
    for pattern, files in LOOKS.items():
        places = {name for name, line in lines(root) if re.search(pattern, line)}
        names = (files,) if isinstance(files, str) else files
        assert places == {f"src/tunesmith/hosts/probe/{name}" for name in names}, pattern


def run(text: str, home: Path, shell: list[str]) -> str:
    """Run a script as a user whose home is a folder; return what it prints."""
    done = subprocess.run(
        shell,
        input=text,
        env={"HOME": str(home), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A provisioned folder that only the start files of a home name."""
    base = tmp_path / "my disk/of mine"
    environment = base / "envs/own"
    environment.mkdir(parents=True)
    (base / "envs/half made").mkdir()
    marker = {"flavour": "cu128", "lock_sha256": "ab" * 32}
    (environment / ".tunesmith-environment.json").write_text(json.dumps(marker, indent=2))
    state = {"format": 1, "fingerprint": "app=1,flavour=auto", "found": ["disk=100% /", "x=y"]}
    (base / "state.json").write_text(json.dumps(state, indent=2))
    (base / "env.sh").write_text("export HF_HOME='/d/Hugging-Face'\n")
    file = f"'{base}/env.sh'"
    (tmp_path / ".bashrc").write_text(
        f"# BEGIN tunesmith (inv provision)\nif [ -r {file} ]; then . {file}; fi\n"
        "# END tunesmith (inv provision)\n"
    )
    return base


@pytest.mark.parametrize("shell", shells(), ids=lambda words: words[0])
def test_every_shell_answers_for_every_section(
    tmp_path: Path, elsewhere: Path, shell: list[str]
) -> None:
    answer = Answer(run(ALL, tmp_path, shell), "gpu1", SECTIONS)
    for section in SECTIONS:
        assert answer.of(section) is not None
    assert answer.of(User).home == str(tmp_path)
    places = answer.of(Places)
    assert (places.provisioned, places.base) == (str(elsewhere), str(elsewhere))
    assert places.data_disk == str(elsewhere.parent)
    assert places.room and places.room.free > 0
    assert sorted((e.path, e.flavour) for e in answer.of(Environments).environments) == [
        (f"{elsewhere}/envs/half made", ""),
        (f"{elsewhere}/envs/own", "cu128"),
    ]
    assert answer.of(Provisioned).asked == {"app": "1", "flavour": "auto"}
    assert answer.of(Provisioned).hf_home == "/d/Hugging-Face"
    recorded = json.loads(answer.of(Findings).recorded)
    assert recorded == json.loads((elsewhere / "state.json").read_text())


@pytest.mark.parametrize("shell", shells(), ids=lambda words: words[0])
def test_a_command_of_our_own_finds_the_environment(
    tmp_path: Path, elsewhere: Path, shell: list[str]
) -> None:
    tell = 'find_provisioned\nfind_environment\necho "$provisioned|$environment"\n'
    assert run(with_places(tell), tmp_path, shell) == f"{elsewhere}|{elsewhere}/envs/own\n"


def test_a_folder_that_is_given_is_taken(tmp_path: Path, elsewhere: Path) -> None:
    given = tmp_path / "an other's; touch x"
    text = script([Places.SECTION], ProbeSettings(base=str(given)))
    said = run(text, tmp_path, ["sh", "-s"])
    assert f"base={given}\n" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("word", ["/my disk", "/a*", "/[a]", "/a\nb", ""])
def test_a_disk_that_is_no_word_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"^disk .*: expected no blanks"):
        script([Places.SECTION], ProbeSettings(disks=(word,)))


def test_an_answer_holds_what_was_asked_and_ends(tmp_path: Path) -> None:
    said = run(script([User.SECTION], ProbeSettings()), tmp_path, ["sh", "-s"])
    assert "data_disk" not in said, "a section that nobody asked for"
    for length in range(len(said) - len("end=0.00\n")):
        with pytest.raises(TruncatedError):
            Answer(said[:length], "gpu1", (User,))


def test_more_of_a_key_than_a_host_has_is_refused() -> None:
    many = "gpu=x\n" * 1001
    with pytest.raises(TunesmithError, match=r"^gpu1: .*: gpu: expected at most 1000 of them"):
        Answer(f"tunesmith_probe=2\n{many}end=0.1\n", "gpu1", (Gpus,))
