"""A replica of a rented host: a container that answers SSH, with a data disk of its own.

`reboot` is power off and on, `rebuild` is what platforms do to a broken host (`/` is the
image's again, the data disk stays), `destroy` is release. The faults are those a rented
host really has; each can be undone, and `cut_ssh` counts so that a test can see it fired.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from replica.build import BUNDLE, KINDS, Images
from replica.engine import docker, locked, state

LABEL = "tunesmith.replica"
# The process that started it; hosts of a dead one are swept. Zero: started by hand.
BY_HAND = 0
MIRROR = "http://127.0.0.1:8099"
GPU_MODES = (
    *("ok", "two", "busy", "mixed", "pascal", "blackwell", "blackwell_old_driver", "old_driver"),
    *("middle_driver", "no_gpu", "no_driver", "nvml_error", "absent"),
)
_SMI = "/usr/bin/nvidia-smi"
_START_SECONDS = 90
# What an installation brought, on the data disk: uv's cache, and the index of what is in it.
WHEELS = ("tunesmith/cache/uv", "tunesmith/cache/wheels")


def mirror_content(**changes: object) -> dict[str, object]:
    """Return the mirror that replica hosts can reach; PyPI is the real one."""
    return {
        "hf_endpoints": ["https://huggingface.co"],
        "pypi_indexes": ["https://pypi.org/simple"],
        "conda_channels": [f"{MIRROR}/conda-forge"],
        "miniforge_urls": [f"{MIRROR}/miniforge/{{version}}"],
        "apt": [],
        "docker_registries": [],
        "ca_bundle": str(BUNDLE),
        **changes,
    }


@dataclass(frozen=True)
class Options:
    """How a replica host is made.

    `memory` and `cpus` are Docker's (`2g`, `1.5`); `disk_bytes` and `disk_inodes` give the
    data disk a file system of that size, otherwise it is a folder of this machine's;
    `data_disk` is where the host sees it, None for no data disk at all.
    """

    kind: str = "autodl"
    gpu: str = "no_gpu"
    memory: str | None = None
    cpus: float | None = None
    shm_size: str = "1g"
    data_disk: str | None = ""
    disk_bytes: int | None = None
    disk_inodes: int | None = None
    warm: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}; known are {KINDS}")
        if self.gpu not in GPU_MODES:
            raise ValueError(f"gpu {self.gpu!r}; known are {GPU_MODES}")

    @property
    def mount(self) -> str | None:
        """Where the data disk is mounted in the host."""
        if self.data_disk == "":
            return "/root/autodl-tmp" if self.kind == "autodl" else "/data"
        return self.data_disk


@dataclass
class Replica:
    """One replica host. Made by `start`; `destroy` removes all of it."""

    name: str
    image: str
    port: int
    password: str
    options: Options
    owner: int = BY_HAND

    @property
    def user(self) -> str:
        """The account that logs in."""
        return "root" if self.options.kind == "autodl" else "ubuntu"

    @property
    def key(self) -> Path:
        """Private key that the host accepts."""
        return access_key()

    @property
    def address(self) -> str:
        """The line a rental console would show."""
        return f"ssh -p {self.port} {self.user}@127.0.0.1"

    @property
    def container(self) -> str:
        """Name of the container."""
        return f"replica-{self.name}"

    @property
    def disk(self) -> Path:
        """The data disk as this machine sees it."""
        return state() / "disks" / self.name

    # --- talking to it -------------------------------------------------------------------

    def exec(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        text: str | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, past SSH."""
        words = ["exec", "--interactive", "--user", user, self.container, *argv]
        return docker(*words, text=text, check=check)

    def sh(self, script: str, *, check: bool = True) -> str:
        """Run a shell script inside as root, past SSH; return its output."""
        return self.exec(["sh", "-c", script], check=check).stdout

    def ssh(
        self, command: str, *, options: Sequence[str] = (), text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command through SSH with the key, without any configuration of ours."""
        # The first value of an option counts: the caller's stand before ours.
        argv = ["ssh", *options, "-F", "none", "-i", str(self.key), "-p", str(self.port)]
        argv += ["-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]
        argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        argv += [f"{self.user}@127.0.0.1", command]
        stdin = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
        return subprocess.run(argv, capture_output=True, text=True, check=False, **stdin)

    def fingerprint(self) -> str:
        """SHA256 fingerprint of its ed25519 host key."""
        shown = self.sh("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
        return shown.split()[1]

    # --- power ---------------------------------------------------------------------------

    def off(self) -> None:
        """Cut the power: nothing is told to end."""
        docker("kill", self.container, check=False)
        docker("wait", self.container)

    def on(self) -> None:
        """Switch on after `off` or a shutdown; disks and port are as before."""
        docker("start", self.container)
        self._wait()

    def reboot(self) -> None:
        """Power off and on."""
        self.off()
        self.on()

    def running(self) -> bool:
        """Whether it is switched on."""
        shown = docker("inspect", "--format", "{{.State.Running}}", self.container)
        return shown.stdout.strip() == "true"

    def rebuild(self, *, same_port: bool = True) -> None:
        """Make `/` anew from the image, on the same data disk; the host key is a new one."""
        docker("rm", "--force", self.container)
        if not same_port:
            self.port = _free_port()
        self._run()

    def destroy(self) -> None:
        """Release it: host and data disk are gone."""
        docker("rm", "--force", "--volumes", self.container, check=False)
        remove_disk(self.name)

    # --- the GPU, the clock, the mirror --------------------------------------------------

    def set_mode(self, gpu: str) -> None:
        """Change what nvidia-smi says: one of GPU_MODES."""
        dataclasses.replace(self.options, gpu=gpu)  # refuses an unknown one
        if gpu == "absent":
            self.sh(f"rm -f {_SMI}")
        else:
            self.sh(f"cp /init/gpu.sh {_SMI}; echo {gpu} >/etc/replica/gpu")

    def set_clock(self, seconds: int) -> None:
        """Let programs started through SSH see a clock that is wrong by `seconds`."""
        line = f"SetEnv LD_PRELOAD=$(find /usr/lib -name libfaketimeMT.so.1) FAKETIME={seconds:+d}"
        self.sh(f'echo "{line}" >/etc/ssh/clock.conf' if seconds else ": >/etc/ssh/clock.conf")
        self._reload_sshd()

    def slow_bashrc(self, seconds: float) -> None:
        """Let every shell that reads ~/.bashrc wait, as a user's own start hook may."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        self.sh(f"sed -i '1i sleep {seconds}' {home}/.bashrc")

    def set_mirror(self, *faults: str) -> None:
        """Let the mirror be ill: `PATH STATUS`, `PATH stall` or `PATH cut`; none: well again."""
        self.exec(["tee", "/etc/replica/mirror"], text="".join(f"{line}\n" for line in faults))

    def mirror_requests(self) -> list[str]:
        """Return the lines of the mirror's log."""
        return self.sh("cat /var/log/mirror.log").splitlines()

    # --- SSH -----------------------------------------------------------------------------

    def new_host_key(self) -> None:
        """Give it another host key; sessions that are open stay so."""
        self.sh(
            "rm /etc/ssh/ssh_host_*; for kind in ed25519 ecdsa; do"
            " ssh-keygen -q -t $kind -N '' -f /etc/ssh/ssh_host_${kind}_key; done"
        )
        self._reload_sshd()

    def _reload_sshd(self) -> None:
        """Let sshd read its files again, and wait until it listens anew."""
        sockets = "$(readlink /proc/$pid/fd/* | grep socket)"
        self.sh(
            f"pid=$(cat /run/sshd.pid); before={sockets}; kill -HUP $pid; "
            f'until now={sockets} && [ -n "$now" ] && [ "$now" != "$before" ]; do sleep 0.02; done'
        )
        self._wait()

    def cut_ssh(self, how: str = "kill") -> int:
        """Cut the open connections; return how many were hit (kill) or 0.

        `kill` ends each session once. `reset` answers every packet with a reset and `drop`
        answers nothing, both until `heal_ssh`; `cut_packets` counts what they caught.
        """
        if how == "kill":
            shown = self.sh("pgrep -f '^sshd: [a-z]+ \\[priv\\]|^sshd: [a-z]+@'", check=False)
            victims = shown.split()
            # Children first: the privileged parent would else end them in good order.
            self.sh(f"kill -KILL {' '.join(reversed(victims))}", check=False)
            return len(victims)
        answer = {"reset": ["REJECT", "--reject-with", "tcp-reset"], "drop": ["DROP"]}[how]
        state_match = ["-m", "conntrack", "--ctstate", "ESTABLISHED"] if how == "reset" else []
        self._iptables("-I", "INPUT", "-p", "tcp", "--dport", "22", *state_match, "-j", *answer)
        if how == "drop":
            self._iptables("-I", "OUTPUT", "-p", "tcp", "--sport", "22", "-j", *answer)
        return 0

    def cut_packets(self) -> int:
        """Return how many packets of SSH were rejected or dropped since the cut."""
        lines = self._iptables("-L", "-v", "-x", "-n").splitlines()
        return sum(int(line.split()[0]) for line in lines if "dpt:22" in line or "spt:22" in line)

    def heal_ssh(self) -> None:
        """Let packets pass again."""
        self._iptables("-F", "INPUT")
        self._iptables("-F", "OUTPUT")

    def _iptables(self, *words: str) -> str:
        pid = docker("inspect", "--format", "{{.State.Pid}}", self.container).stdout.strip()
        argv = ["nsenter", "--net", "--target", pid, "iptables", "-w", *words]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    # --- the data disk -------------------------------------------------------------------

    def fill_disk(self, free: int) -> None:
        """Fill the data disk until `free` bytes are left (needs `disk_bytes`)."""
        fill = self._limited() / ".fill"
        fill.unlink(missing_ok=True)
        there = os.statvfs(self.disk)
        size = there.f_bavail * there.f_frsize - free
        if size <= 0:
            raise RuntimeError(f"{self.disk}: only {size + free} bytes are free")
        with fill.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def use_inodes(self, left: int) -> None:
        """Use up the data disk's inodes until `left` are free (needs `disk_bytes`)."""
        folder = self._limited() / ".inodes"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))
        for name in range(number, number + os.statvfs(self.disk).f_favail - left):
            (folder / str(name)).touch()

    def free_disk(self) -> None:
        """Undo `fill_disk` and `use_inodes`."""
        (self.disk / ".fill").unlink(missing_ok=True)
        shutil.rmtree(self.disk / ".inodes", ignore_errors=True)

    def _limited(self) -> Path:
        if self.options.disk_bytes is None:
            raise RuntimeError(f"{self.name}: its data disk is this machine's; give disk_bytes")
        return self.disk

    def is_warm(self) -> bool:
        """Whether wheels were saved for hosts of this kind."""
        return all((state() / "warm" / self.options.kind / path).is_dir() for path in WHEELS)

    def keep_warm(self, *paths: str) -> None:
        """Save what lies at `paths` of the data disk for hosts started with `warm=True`.

        Files are linked, not copied, where the file system allows it: never change one in
        place. Without paths: the cache of uv, and the index of what is in it.
        """
        store = state() / "warm" / self.options.kind
        with locked("warm"):
            for path in paths or WHEELS:
                _clone(self.disk / path, store / path)

    def forget_warm(self, *paths: str) -> None:
        """Remove what `keep_warm` saved."""
        for path in paths or WHEELS:
            shutil.rmtree(state() / "warm" / self.options.kind / path)

    # --- making it -----------------------------------------------------------------------

    def _run(self) -> None:
        options = self.options
        words = ["run", "--detach", "--name", self.container, "--label", f"{LABEL}={self.name}"]
        words += ["--label", f"{LABEL}.options={json.dumps(dataclasses.asdict(options))}"]
        words += ["--label", f"{LABEL}.password={self.password}"]
        words += ["--label", f"{LABEL}.state={state()}", "--label", f"{LABEL}.owner={self.owner}"]
        words += ["--hostname", f"{options.kind}-container-{self.name}"]
        words += ["--publish", f"127.0.0.1:{self.port}:22", "--shm-size", options.shm_size]
        words += ["--memory", options.memory] if options.memory else []
        words += ["--cpus", str(options.cpus)] if options.cpus else []
        if options.mount:
            words += ["--volume", f"{self.disk}:{options.mount}"]
        public = self.key.with_suffix(".pub").read_text(encoding="utf-8").strip()
        words += ["--env", f"REPLICA_KEY={public}", "--env", f"REPLICA_PASSWORD={self.password}"]
        docker(*words, self.image)
        if options.gpu != "no_gpu":
            self.set_mode(options.gpu)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not _greets(self.port):
            if time.monotonic() > deadline:
                log = docker("logs", "--tail", "5", self.container, check=False)
                raise RuntimeError(f"{self.container} does not answer SSH: {log.stderr.strip()}")
            time.sleep(0.05)


def start(
    images: Images,
    options: Options | None = None,
    name: str | None = None,
    owner: int = BY_HAND,
) -> Replica:
    """Start a replica host and wait until it answers SSH.

    With `owner`, a process, `sweep` removes the host once that process is gone.
    """
    options = options or Options()
    name = name or secrets.token_hex(4)
    image = images.autodl if options.kind == "autodl" else images.vm
    replica = Replica(name, image, _free_port(), secrets.token_urlsafe(9), options, owner)
    make_disk(name, options)
    try:
        replica._run()
    except BaseException:
        replica.destroy()
        raise
    return replica


def find(name: str) -> Replica:
    """Return a replica host that runs, by its name. Raises RuntimeError when there is none."""
    shown = json.loads(docker("inspect", f"replica-{name}").stdout)[0]
    labels = shown["Config"]["Labels"]
    port = shown["HostConfig"]["PortBindings"]["22/tcp"][0]["HostPort"]
    options = Options(**json.loads(labels[f"{LABEL}.options"]))
    image = shown["Config"]["Image"]
    owner = int(labels[f"{LABEL}.owner"])
    return Replica(name, image, int(port), labels[f"{LABEL}.password"], options, owner)


def names() -> list[str]:
    """Return the names of all replica hosts of this clone, running or not."""
    ours = ("--filter", f"label={LABEL}.state={state()}")
    form = f'{{{{.Label "{LABEL}"}}}}'
    return docker("ps", "--all", *ours, "--format", form).stdout.split()


def sweep() -> None:
    """Remove the hosts that test runs left when they were killed."""
    for name in names():
        left = find(name)
        if left.owner != BY_HAND and not Path(f"/proc/{left.owner}").exists():
            left.destroy()


def access_key() -> Path:
    """Return the private key that every replica host accepts; it is made once."""
    key = state() / "id_ed25519"
    with locked("key"):
        if not key.exists():
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "replica", "-f", str(key)]
            subprocess.run(argv, check=True)
    return key


def make_disk(name: str, options: Options) -> None:
    """Make a data disk: a folder, or a file system of its own where its size is given."""
    if options.mount is None:
        return
    disk = state() / "disks" / name
    disk.mkdir(parents=True)
    if options.disk_bytes is not None:
        image = disk.with_suffix(".ext4")
        with image.open("wb") as file:
            file.truncate(options.disk_bytes)
        inodes = ["-N", str(options.disk_inodes)] if options.disk_inodes else []
        make = ["mkfs.ext4", "-q", "-F", "-m", "0", *inodes, str(image)]
        for argv in (make, ["mount", "-o", "loop", str(image), str(disk)]):
            subprocess.run(
                argv, check=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/sbin"}
            )
        (disk / "lost+found").rmdir()
    warm = state() / "warm" / options.kind
    with locked("warm"):
        if options.warm and warm.is_dir():
            _clone(warm, disk)


def remove_disk(name: str) -> None:
    """Remove a data disk."""
    disk = state() / "disks" / name
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)
    disk.with_suffix(".ext4").unlink(missing_ok=True)
    shutil.rmtree(disk, ignore_errors=True)


def _clone(source: Path, target: Path) -> None:
    """Copy a tree by links, or by bytes onto another file system."""
    target.mkdir(parents=True, exist_ok=True)
    same = source.stat().st_dev == target.stat().st_dev
    argv = ["cp", "--archive", *(["--link"] if same else []), f"{source}/.", str(target)]
    subprocess.run(argv, check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _greets(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as peer:
        peer.settimeout(2)
        return peer.recv(4) == b"SSH-"
    return False


@contextlib.contextmanager
def running(images: Images, options: Options | None = None) -> Iterator[Replica]:
    """Start a replica host and destroy it at the end."""
    replica = start(images, options, owner=os.getpid())
    try:
        yield replica
    finally:
        replica.destroy()
