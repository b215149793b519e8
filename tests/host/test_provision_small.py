"""Several hosts at once, a secret, drift, and runs that are killed; with the small lock.

Three hosts, provisioned once; the tests run in the order of the file.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import cli
from replica.engine import state
from replica.replica import Replica
from replica_fixtures import HostProject
from support import THOROUGH
from tests.host import small

pytestmark = pytest.mark.host

SEED = 20_251_125
MOMENTS = 10 if THOROUGH else 6
# How a run is interrupted: inv alone, all of its processes as by a power cut, its SSH.
FAULTS = ("kill inv", "kill all", "cut ssh")
# A connection that is gone for a while: a task that waits for a long step goes on after it.
CUT_SECONDS = 12
END_SECONDS = 300


@dataclass
class Rented:
    """One of the hosts, and `inv` with a state folder of its own: hosts can go in parallel."""

    name: str
    replica: Replica
    project: HostProject
    home: Path
    # Tasks that change something on a host that has its system packages and nothing of ours.
    steps: int = 0

    @property
    def base(self) -> str:
        return f"{self.replica.options.mount}/tunesmith"

    @property
    def user_home(self) -> str:
        return "/root" if self.replica.user == "root" else f"/home/{self.replica.user}"

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = os.environ | {"TUNESMITH_HOME": str(self.home)}
        return cli.start(self.project.project.root, *words, env=environment)

    def inv(self, *words: str) -> tuple[int, str]:
        """Run inv to its end; return exit code and output."""
        with self.start(*words) as process:
            text = process.communicate(timeout=1200)[0]
        return process.returncode, text

    def provision(self, *words: str) -> tuple[int, str]:
        mirror = str(self.project.mirror)
        return self.inv("provision", "--on", self.name, "--mirror", mirror, *words)

    def make_fresh(self) -> None:
        """Take away what provisioning made; system packages stay, for they are not ours."""
        files = f"{self.user_home}/.bashrc {self.user_home}/.profile"
        self.replica.sh(
            f"rm -rf {self.base}; sed -i '/BEGIN tunesmith/,/END tunesmith/d' {files} || true;"
            f" sed -i '/envs_dirs/,$d' {self.user_home}/.condarc || true"
        )


@pytest.fixture(scope="module")
def rented(
    host_project: HostProject,
    three_hosts: tuple[Replica, Replica, Replica],
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Rented, Rented, Rented]]:
    """Three hosts in the inventory, with the small lock on their mirrors: gpu1, gpu2, vm1."""
    small.use(host_project, small.small_lock(root), *three_hosts)
    folder = tmp_path_factory.mktemp("rented")
    names = ("gpu1", "gpu2", "vm1")
    hosts = [
        Rented(name, replica, host_project, folder / name)
        for name, replica in zip(names, three_hosts, strict=True)
    ]
    for host in hosts:
        words = (host.name, host.replica.address, "--identity", str(host_project.key))
        code, text = host.inv("host.add", *words)
        assert code == 0, text
    yield hosts[0], hosts[1], hosts[2]
    for host in hosts:
        assert host.inv("host.remove", host.name)[0] == 0


def rows(output: str) -> dict[str, str]:
    """Return the table at the end: the result of each host."""
    words = "changed|nothing to change|failed|not reached|in state"
    return dict(re.findall(rf"(?m)^(gpu1|gpu2|vm1) +({words})\b", output))


def changes(output: str, name: str) -> int:
    """Return how many tasks changed something on a host, from the table."""
    found = re.search(rf"(?m)^{name} +(?:changed|nothing to change) +\d+ +(\d+) ", output)
    assert found, output
    return int(found[1])


def test_one_of_three_fails_and_the_others_finish(
    host_project: HostProject, rented: tuple[Rented, Rented, Rented]
) -> None:
    gpu1, gpu2, vm1 = rented
    gpu2.replica.set_mode("old_driver")
    source = ("--mirror", str(host_project.mirror))
    done = host_project.inv("provision", "--on", "gpu1,gpu2,vm1", *source)
    assert done.returncode == 1, done.stdout
    assert rows(done.stdout) == {"gpu1": "changed", "gpu2": "failed", "vm1": "changed"}
    assert done.stdout.count("never provisioned") == 3
    assert "1 of 3 hosts failed: gpu2" in done.stderr
    assert "driver" in done.stderr
    assert "525" in done.stderr, "the minimum is named"
    assert gpu2.replica.sh(f"ls {gpu2.base}/envs 2>/dev/null; true") == "", "refused before a byte"
    for host in (gpu1, vm1):
        host.steps = changes(done.stdout, host.name) - 1
    for host in (gpu1, vm1):
        code, text = host.inv("host.verify", "--on", host.name)
        assert code == 0, text
    code, text = gpu2.inv("host.verify", "--on", "gpu2")
    assert code == 1, text

    # The host that failed is mended alone: the others are in state.
    gpu2.replica.set_mode("no_gpu")
    done = host_project.inv("provision", "--on", "gpu1,gpu2,vm1", *source)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == {"gpu1": "in state", "gpu2": "changed", "vm1": "in state"}
    gpu2.steps = changes(done.stdout, "gpu2") - 1


# --- the token ---------------------------------------------------------------------------


@dataclass
class Watch:
    """Reads command lines and environments of every process, here and on the hosts.

    Containers' processes are this machine's, too. `found` are those with the text in them,
    `seen` all the names of programs.
    """

    text: bytes
    found: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    rounds: int = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                for folder in Path("/proc").glob("[0-9]*"):
                    # A process that ended meanwhile.
                    with contextlib.suppress(OSError):
                        command = (folder / "cmdline").read_bytes()
                        self.seen.add(command.replace(b"\0", b" ").decode(errors="replace"))
                        if self.text in command + (folder / "environ").read_bytes():
                            self.found.add(command.decode(errors="replace"))
                self.rounds += 1

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def holding(text: str, *folders: Path, newer: Path | None = None) -> list[str]:
    """Return the files on this machine that have a text in them."""
    when = ["-newer", str(newer)] if newer else []
    argv = ["find", *map(str, folders), "-type", "f", *when, "-exec"]
    argv += ["grep", "-l", "-s", "-F", "-e", text, "{}", "+"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()


def test_a_token_is_nowhere_but_in_its_file(
    host_project: HostProject, rented: tuple[Rented, Rented, Rented], tmp_path: Path
) -> None:
    token = "canary-" + secrets.token_hex(16)
    began = tmp_path / "began"
    began.touch()
    watch = Watch(token.encode())
    # The watch itself works: in a command line, and in an environment.
    with watch.watching():
        subprocess.run(["sleep", "1"], env={"CANARY": token}, check=True)
    assert watch.found, "a token in an environment is seen"
    watch.found.clear()

    names = ("gpu1", "vm1")
    words = ("provision", "--on", ",".join(names), "--mirror", str(host_project.mirror))
    with pytest.MonkeyPatch.context() as patch, watch.watching():
        patch.setenv("ANSIBLE_VERBOSITY", "4")
        done = host_project.inv(*words, "--token", text=f"{token}\n")
    assert done.returncode == 0, done.stderr
    log = Path(re.search(r"(?m)^log: (.+)$", done.stdout)[1])  # type: ignore[index]
    assert "SSH: EXEC" in (log / "ansible.log").read_text(), "it was as talkative as it can be"

    assert watch.rounds > 20
    assert any("ansible-playbook" in command for command in watch.seen)
    assert any("miniconda3/bin/python" in command for command in watch.seen), "the hosts, too"
    assert watch.found == set()
    assert token not in done.stdout + done.stderr
    own = (host_project.project.root.parent, host_project.project.home)
    assert holding(token, *own) == []
    places = [Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm", "/root/.ansible")]
    # The hosts' own disks lie on this machine too: what is there is looked at below.
    found = holding(token, *filter(Path.is_dir, places), newer=began)
    assert [file for file in found if not Path(file).is_relative_to(state())] == []

    everywhere = "grep -rlsF --exclude-dir=proc --exclude-dir=sys --exclude-dir=dev -e"
    for host in rented:
        shown = host.replica.sh(f"{everywhere} {token} / /dev/shm; true").split()
        assert shown == ([f"{host.base}/token"] if host.name in names else [])
    for host in (host for host in rented if host.name in names):
        assert host.replica.sh(f"cat {host.base}/token").strip() == token
        facts = host.replica.sh(f"stat -c '%a %U' {host.base}/token").split()
        assert facts == ["600", host.replica.user]

    # Not a token: refused, and not repeated.
    refused = host_project.inv(*words, "--token", text="two words\n")
    assert (refused.returncode, "two words" in refused.stderr) == (2, False)


# --- drift -------------------------------------------------------------------------------


def test_every_drift_is_named_and_one_run_mends_all(
    rented: tuple[Rented, Rented, Rented],
) -> None:
    gpu1 = rented[0]
    packages = f"{gpu1.base}/envs/llama-factory/lib/python3.10/site-packages"
    drifts = {
        f"rm {packages}/yaml/loader.py": r"site-packages/yaml: \d+ files -> \d+ files",
        f"echo '# mine' >>{packages}/packaging/version.py": (
            r"site-packages/packaging: .*\(\+7 bytes\)"
        ),
        f"sed -i 's/Welcome/welcome/' {packages}/llamafactory/__init__.py": (
            r"llamafactory: a file was rewritten with the same size"
        ),
        f"echo '# mine' >>$(ls -d {gpu1.base}/app/*)/pyproject.toml": r"app/\w+",
        f"echo '# mine' >>{gpu1.base}/env.sh": r"env\.sh was edited",
        "sed -i '/BEGIN tunesmith/,/END tunesmith/d' /root/.bashrc": r"\.bashrc: our part is gone",
        "rm /root/.condarc": r"\.condarc: our part is gone",
    }
    # What a user adds beside ours is none.
    gpu1.replica.sh(f"mkdir {packages}/mine && touch {packages}/mine/__init__.py {packages}/m.py")
    gpu1.replica.sh(f"echo hi >{gpu1.base}/envs/llama-factory/bin/mine")
    assert "in state" in gpu1.provision()[1]
    for seed in drifts:
        gpu1.replica.sh(seed)
    code, text = gpu1.provision()
    assert code == 0, text
    named = re.findall(r"(?m)^  (\S.*)$", text.partition("[")[0])
    assert len(named) == len(drifts), named
    for pattern in drifts.values():
        assert any(re.search(pattern, line) for line in named), (pattern, named)

    assert "in state" in gpu1.provision()[1]
    code, text = gpu1.inv("host.verify", "--on", "gpu1")
    assert code == 0, text
    code, text = gpu1.provision("--full")
    assert (code, changes(text, "gpu1")) == (0, 0), text


# --- a host that vanishes ----------------------------------------------------------------


def test_a_host_that_vanishes_is_told_and_given_up(rented: tuple[Rented, Rented, Rented]) -> None:
    gpu2 = rented[1]
    gpu2.make_fresh()
    defaults = gpu2.project.project.root / "ansible/roles/job/defaults/main.yml"
    before = defaults.read_text()
    defaults.write_text(before.replace("job_patience: 180", "job_patience: 8"))
    # Long enough that the line is cut while it is waited for.
    script = gpu2.project.project.root / "ansible/roles/conda/files/create_prefix.sh"
    quick = script.read_text()
    script.write_text(quick.replace("umask 077\n", "umask 077\nsleep 20\n", 1))
    lines: list[str] = []
    mirror = str(gpu2.project.mirror)
    with gpu2.start("provision", "--on", "gpu2", "--mirror", mirror) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "Wait | create the environment: " in line:
                break
        gpu2.replica.cut_ssh("drop")
        cut = time.monotonic()
        told = None
        try:
            for line in process.stdout:
                lines.append(line)
                if told is None and ": unreachable (" in line:
                    told = time.monotonic() - cut
            code = process.wait(timeout=END_SECONDS)
            given_up = time.monotonic() - cut
        finally:
            gpu2.replica.heal_ssh()
    output = "".join(lines)
    assert code == 1, output
    assert told is not None and told < 90, output
    assert "no answer for 8 s during" in output
    assert given_up < 170, output

    defaults.write_text(before)
    script.write_text(quick)
    code, text = gpu2.provision()
    assert code == 0, text
    code, text = gpu2.provision("--full")
    assert (code, changes(text, "gpu2")) == (0, 0), text


# --- interruptions -----------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """After `step` changes and `delay` seconds more, `fault` strikes."""

    step: int
    delay: float
    fault: str


def moments(steps: int, mine: range) -> list[Moment]:
    """Return those of the MOMENTS that are a host's: one from each equal part of the play."""
    found = []
    for number in mine:
        chance = random.Random(SEED + number)
        step = int((number + chance.random()) / MOMENTS * steps)
        fault = FAULTS[(number + number // len(FAULTS)) % len(FAULTS)]
        found.append(Moment(step, chance.uniform(0, 3), fault))
    return found


def family(pid: int) -> list[int]:
    """Return a process and all that come from it."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (folder / "stat").read_text()
            parents[int(folder.name)] = int(text.rpartition(")")[2].split()[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def interrupt(host: Rented, moment: Moment) -> str | None:
    """Provision and strike; return the last line before it, None when it came too late."""
    lines: list[str] = []
    mirror = str(host.project.mirror)
    with host.start("provision", "--on", host.name, "--mirror", mirror) as process:
        assert process.stdout is not None
        done = 0
        while done < moment.step:
            line = process.stdout.readline()
            if not line:
                break
            lines.append(line.strip())
            done += ": changed" in line
        rest = threading.Thread(
            target=lambda: lines.extend(map(str.strip, process.stdout or ())), daemon=True
        )
        rest.start()
        time.sleep(moment.delay)
        if process.poll() is not None:
            return None
        struck = lines[-1] if lines else "before the first task"
        if moment.fault == "cut ssh":
            host.replica.cut_ssh("reset")
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=CUT_SECONDS)
                hit = host.replica.cut_packets()
            finally:
                host.replica.heal_ssh()
            code = process.wait(timeout=END_SECONDS)
            rest.join()
            if hit == 0:
                return None
            assert code in (0, 1), lines
            struck += f" (the run {'went on' if code == 0 else 'failed'})"
        else:
            for victim in family(process.pid) if moment.fault == "kill all" else [process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            assert process.wait(timeout=END_SECONDS) == -signal.SIGKILL
        return struck


def survive(host: Rented, mine: list[Moment]) -> list[str]:
    """Interrupt a fresh provisioning at each moment and let the next run heal it."""
    told = []
    for moment in mine:
        step, struck = moment.step, None
        while struck is None:
            assert step >= 0, f"{moment}: the run always ends before it"
            host.make_fresh()
            struck = interrupt(host, Moment(step, moment.delay, moment.fault))
            step -= 1
        where = f"seed {SEED}, {host.name}, {moment}, struck after: {struck}"
        told.append(where)

        code, text = host.provision()
        assert code == 0, f"{where}\n{text}"
        code, text = host.provision("--full")
        assert (code, changes(text, host.name)) == (0, 0), f"{where}\n{text}"
    code, text = host.inv("host.verify", "--on", host.name)
    assert code == 0, f"{told}\n{text}"
    return told


def test_killed_at_any_moment_the_next_run_converges(
    rented: tuple[Rented, Rented, Rented],
) -> None:
    with ThreadPoolExecutor(max_workers=len(rented)) as pool:
        lanes = [
            pool.submit(survive, host, moments(host.steps, range(lane, MOMENTS, len(rented))))
            for lane, host in enumerate(rented)
        ]
        told = [line for lane in lanes for line in lane.result()]
    print("\n".join(told))
    assert len(told) == MOMENTS


# --- what stays --------------------------------------------------------------------------


def test_reset_takes_what_is_ours_and_nothing_else(rented: tuple[Rented, Rented, Rented]) -> None:
    gpu1 = rented[0]
    hf_home = f"{gpu1.replica.options.mount}/Hugging-Face"
    kept = [f"{gpu1.base}/{name}" for name in ("data/mine.json", "models/mine/a", "runs/mine/a")]
    kept += [f"{hf_home}/hub/models--mine/a", f"{gpu1.replica.options.mount}/mine"]
    for file in kept:
        gpu1.replica.sh(f"mkdir -p $(dirname {file}) && echo mine >{file}")
    gpu1.replica.sh("echo '# mine' >>/root/.bashrc")

    assert gpu1.inv("--dry", "host.reset", "--on", "gpu1")[0] == 0
    gpu1.replica.sh(f"ls {gpu1.base}/envs/llama-factory/bin/llamafactory-cli")

    code, text = gpu1.inv("host.reset", "--on", "gpu1")
    assert code == 0, text
    assert gpu1.replica.sh(f"cat {' '.join(kept)}").split() == ["mine"] * len(kept)
    assert gpu1.replica.sh(f"ls -A {gpu1.base}").split() == ["data", "models", "runs"]
    assert "# mine" in gpu1.replica.sh("cat /root/.bashrc")
    files = "/root/.bashrc /root/.condarc /root/.profile"
    assert gpu1.replica.sh(f"grep -l tunesmith {files} 2>/dev/null; true") == ""
    assert gpu1.replica.ssh("echo $HF_HOME").stdout == "\n"
    conda = gpu1.replica.sh("/root/miniconda3/bin/conda --version")
    assert "stand-in" in conda, "the platform's stays"
    code, text = gpu1.inv("host.reset", "--on", "gpu1")
    assert code == 0, text
