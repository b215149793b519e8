"""Hosts over real OpenSSH: sshd on 127.0.0.1, in a mount namespace with users of its own.

The namespace gives root another password and home, so the machine's own files are left
alone. Its login shell notes every command, so that "nothing was sent" can be proven.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import traps
from overlay import overlaid
from support import lacking
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.hosts import agent, commands, inventory, login
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.replies import RunList
from tunesmith.project import Project

pytestmark = pytest.mark.contract

PASSWORD = r"canary \7 'x' pw"
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def new_key(path: Path, passphrase: str = "") -> Path:
    path.unlink(missing_ok=True)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "test", "-f", path]
    subprocess.run(argv, check=True)
    return path


@dataclass
class Sshd:
    """A real sshd as root, with one host key, passwords and key login."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    extra: list[str] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def line(self) -> str:
        return f"ssh -p {self.port} root@127.0.0.1"

    def commands(self) -> list[str]:
        """Every command the login shell was started with."""
        log = self.folder / "commands"
        return log.read_text().splitlines() if log.exists() else []

    def authorize(self, key: Path) -> None:
        folder = self.home / ".ssh"
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / "authorized_keys").write_text(key.with_name(f"{key.name}.pub").read_text())

    def prepare(self) -> None:
        self.home.mkdir(parents=True)
        # Start files of rented hosts talk, and leave early when nobody types.
        (self.home / ".bashrc").write_text(
            "echo noise from .bashrc\ncase $- in *i*) ;; *) return;; esac\n"
        )
        shell = self.folder / "shell"
        shell.write_text(
            f'#!/bin/bash\nprintf \'%s\\n\' "$*" >>{self.folder}/commands\nexec /bin/bash "$@"\n'
        )
        shell.chmod(0o755)
        argv = ["openssl", "passwd", "-6", "-stdin"]
        done = subprocess.run(argv, input=PASSWORD, capture_output=True, text=True, check=True)
        own = {
            "passwd": f"root:x:0:0:root:{self.home}:{shell}",
            "shadow": f"root:{done.stdout.strip()}:20000:0:99999:7:::",
        }
        for name, line in own.items():
            others = [x for x in Path(f"/etc/{name}").read_text().splitlines() if x[:5] != "root:"]
            (self.folder / name).write_text("\n".join([line, *others]) + "\n")
        new_key(self.folder / "host_key")

    def start(self) -> None:
        config = self.folder / "sshd_config"
        lines = [
            *self.extra,  # the first value of a keyword counts
            f"HostKey {self.folder}/host_key",
            "ListenAddress 127.0.0.1",
            f"Port {self.port}",
            "PidFile none",
            "PermitRootLogin yes",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication yes",
            "KbdInteractiveAuthentication no",
        ]
        config.write_text("\n".join(lines) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        mounts = " && ".join(
            f"mount --bind {self.folder}/{name} /etc/{name}" for name in ("passwd", "shadow")
        )
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"]
        argv += [f"{mounts} && exec {SSHD} -D -e -f {config}"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """End it and every session in it."""
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None
        # The namespace ends a moment later than the process that made it.
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                return
            time.sleep(0.02)
        raise AssertionError(f"port {self.port} still answers")

    def new_host_key(self) -> None:
        self.stop()
        new_key(self.folder / "host_key")
        self.start()


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder with a short path: ssh's sockets must fit into 107 bytes."""
    if SSHD is None:
        lacking("no sshd here", "`apt-get install openssh-server`")
    if os.geteuid() != 0:
        lacking("sshd with users of its own needs root", "run as root")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        lacking("no mount namespaces here", "run with CAP_SYS_ADMIN")
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        yield Path(folder)


@pytest.fixture
def sshd(short: Path) -> Iterator[Sshd]:
    yield from started(short)


@pytest.fixture
def second(short: Path) -> Iterator[Sshd]:
    yield from started(short)


def started(short: Path) -> Iterator[Sshd]:
    made = Sshd(Path(tempfile.mkdtemp(dir=short)), free_port())
    made.prepare()
    made.start()
    yield made
    made.stop()


@dataclass
class Client:
    """A laptop: a home with a key, and a project with an inventory (blank in its path)."""

    home: Path
    project: Project

    @property
    def key(self) -> Path:
        return self.home / ".ssh" / "id_ed25519"

    @property
    def inventory(self) -> Path:
        return self.project.inventory

    def script(self, code: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run Python where the password file, which ssh asks, has this home, too."""
        passwd = self.home / "passwd"
        text = Path("/etc/passwd").read_text().replace(":/root:", f":{self.home}:", 1)
        passwd.write_text(text)
        inner = f'mount --bind {passwd} /etc/passwd && exec "$@"'
        argv = ["unshare", "--mount", "sh", "-c", inner, "sh", sys.executable, "-c", code]
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture
def client(short: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    home = Path(tempfile.mkdtemp(dir=short))
    place = home / "in ventory"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TUNESMITH_INVENTORY", str(place))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    made = Client(home, Project(root, home / ".tunesmith"))
    made.key.parent.mkdir(mode=0o700)
    new_key(made.key)
    yield made
    for name in inventory.read(place):
        argv = ["ssh", "-F", place / "ssh_config", "-O", "exit", name]
        subprocess.run(argv, capture_output=True, check=False)
        # An ssh that was killed leaves its socket (the next one replaces it).
        socket_of(place / "ssh_config", name).unlink(missing_ok=True)


def socket_of(config: Path, name: str) -> Path:
    """Return the socket of a host's kept connection, as ssh names it."""
    argv = ["ssh", "-F", config, "-G", name]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    line = next(x for x in said.splitlines() if x.startswith("controlpath "))
    home = pwd.getpwuid(os.getuid()).pw_dir
    return Path(line.partition(" ")[2].replace("~", home))


@pytest.fixture
def gpu1(client: Client, sshd: Sshd) -> Remote:
    """The host gpu1 in the client's inventory."""
    sshd.authorize(client.key)
    commands.add(client.project, "gpu1", sshd.line, identity=client.key)
    return Remote("gpu1", client.inventory)


def test_add_pins_logs_in_and_writes(client: Client, sshd: Sshd) -> None:
    sshd.authorize(client.key)
    python = sshd.home / "miniconda3/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    told: list[str] = []
    added = commands.add(client.project, "gpu1", f"{sshd.line} -i {client.key}", tell=told.append)
    argv = ["ssh-keygen", "-l", "-f", sshd.folder / "host_key"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[1]
    assert added.fingerprint == f"{shown} (ED25519)"
    assert told == [f"root@127.0.0.1:{sshd.port}: host key {shown} (ED25519)"]
    assert (added.known, added.installed, added.notes) == (False, None, ())
    values = inventory.parse((client.inventory / "hosts.yml").read_text())
    host = values["gpu_hosts"]["hosts"]["gpu1"]
    assert host["host_address"] == f"root@127.0.0.1:{sshd.port}"
    assert host["ansible_python_interpreter"] == str(python)
    assert commands.listed(client.project) == (added.host,)
    done = Remote("gpu1", client.inventory).run("id -u; echo $0")
    assert done.stdout.splitlines()[0] == "0", "what .bashrc says is not the script's output"


def test_ansible_goes_the_same_way(client: Client, gpu1: Remote) -> None:
    ansible = Path(sys.executable).with_name("ansible")
    hosts = client.inventory / "hosts.yml"
    argv = [ansible, "-i", hosts, "gpu1", "-m", "ansible.builtin.raw", "-a", "echo $((6 * 7))"]
    environment = {**os.environ, "ANSIBLE_SSH_ARGS": "", "ANSIBLE_HOST_KEY_CHECKING": "True"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "\n42\n" in done.stdout


# What a host that is not there is, and how it is told apart.


@contextlib.contextmanager
def listening(answer: bytes | None, *, close: bool = False) -> Iterator[int]:
    """A port that answers these bytes, or nothing at all, to whoever connects."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        kept: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    stream, _ = listener.accept()
                    kept.append(stream)
                    if answer:
                        stream.sendall(answer)
                    if close:
                        stream.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        for stream in kept:
            stream.close()


def add_fails(client: Client, line: str) -> str:
    with pytest.raises(TunesmithError) as caught:
        commands.add(client.project, "gpu1", line)
    assert not (client.inventory / "hosts.yml").exists(), "nothing is written"
    assert not (client.home / ".ssh/config").exists()
    assert caught.value.exit_code == 1
    return caught.value.line


def test_off_moved_blocked_and_wrong_key_are_four_messages(
    client: Client, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "PATIENCE", 0.5)
    monkeypatch.setattr(login.scan_key, "__kwdefaults__", {"patience": 0.5})
    off = add_fails(client, f"root@127.0.0.1:{free_port()}")
    assert "is off (Connection refused)" in off
    assert "start it in the rental console" in off
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        moved = add_fails(client, f"root@127.0.0.1:{port}")
    assert "no SSH server at" in moved
    assert "HTTP/1.1 400" in moved
    with listening(None, close=True) as port:
        assert "no SSH server at" in add_fails(client, f"root@127.0.0.1:{port}")
    assert "no SSH server at" in add_fails(client, "root@no-such-host.invalid:22")
    with listening(None) as port:
        blocked = add_fails(client, f"root@127.0.0.1:{port}")
    assert "does not answer (connected, but no SSH within 0.5 s)" in blocked
    refused = add_fails(client, f"{sshd.line} -i {client.key}")
    assert f"refuses your key (tried: {client.key})" in refused
    assert "--install-key" in refused
    assert sshd.commands() == []


def test_a_banner_behind_other_lines_is_ssh() -> None:
    with listening(b"welcome\r\nSSH-2.0-x\r\n") as port:
        found = login._reach("gpu1", login.Address("127.0.0.1", port), 2.0)
    assert found.kind == "ok"


def test_a_key_with_a_passphrase_is_told_from_a_wrong_one(client: Client, sshd: Sshd) -> None:
    key = new_key(client.home / "locked", "secret words")
    sshd.authorize(key)
    text = add_fails(client, f"{sshd.line} -i {key}")
    assert f"accepts the key {key}, which has a passphrase" in text
    assert f"`ssh-add {key}`" in text


def test_a_login_that_runs_nothing_is_no_host(client: Client, sshd: Sshd) -> None:
    sshd.stop()
    sshd.extra = ["ForceCommand echo no PTY; exit 1"]
    sshd.start()
    sshd.authorize(client.key)
    assert "runs no command" in add_fails(client, f"{sshd.line} -i {client.key}")


def test_an_unexpected_fingerprint_stops_before_the_login(client: Client, sshd: Sshd) -> None:
    sshd.authorize(client.key)
    with pytest.raises(TunesmithError, match="not the expected one"):
        commands.add(
            client.project, "gpu1", sshd.line, identity=client.key, expected="SHA256:other"
        )
    assert "Accepted" not in (sshd.folder / "log").read_text()
    right = login.scan_key("gpu1", login.Address("127.0.0.1", sshd.port)).fingerprint
    commands.add(client.project, "gpu1", sshd.line, identity=client.key, expected=right.split()[0])


@pytest.mark.parametrize("line", ["root@127.0.0.1:1 extra", "-oProxyCommand=touch x"])
def test_misuse_writes_nothing(client: Client, line: str) -> None:
    with pytest.raises(UsageError):
        commands.add(client.project, "gpu1", line)
    with pytest.raises(UsageError):
        commands.add(client.project, "all", "root@127.0.0.1:1")
    with pytest.raises(UsageError, match="ssh-keygen"):
        commands.add(client.project, "gpu1", "root@127.0.0.1:1", identity=Path("/no/key"))
    open_key = client.home / "open"
    open_key.write_text("x")
    open_key.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        commands.add(client.project, "gpu1", "root@127.0.0.1:1", identity=open_key)
    assert not client.inventory.exists()


# Host keys.


def test_another_host_key_stops_every_command(client: Client, gpu1: Remote, sshd: Sshd) -> None:
    assert gpu1.run("true").returncode == 0
    sshd.new_host_key()
    sent = len(sshd.commands())
    with pytest.raises(TunesmithError, match="is not the pinned one") as caught:
        gpu1.run("touch /tmp/never")
    assert "`inv host.trust gpu1`" in caught.value.hint
    assert len(sshd.commands()) == sent, "no command was sent"
    with pytest.raises(TunesmithError, match="another machine than the gpu1 we know"):
        commands.add(client.project, "gpu1", sshd.line, identity=client.key)


def test_a_key_of_another_type_is_another_key(client: Client, gpu1: Remote, sshd: Sshd) -> None:
    sshd.stop()
    key = sshd.folder / "host_key"
    key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", key], check=True)
    sshd.start()
    with pytest.raises(TunesmithError, match="is not the pinned one"):
        gpu1.run("true")


def test_trust_shows_both_keys_and_pins_the_new_one(
    client: Client, gpu1: Remote, sshd: Sshd
) -> None:
    before = gpu1.host.keys
    sshd.new_host_key()
    told: list[str] = []
    trusted = commands.trust(client.project, "gpu1", tell=told.append)
    assert told == [f"pinned: {trusted.before}", f"now:    {trusted.now}"]
    assert trusted.before == login.fingerprint(before) != trusted.now
    assert trusted.notes == ()
    assert Remote("gpu1", client.inventory).run("echo hi").stdout == "hi\n"


def test_trust_pins_a_rebuilt_host_that_has_forgotten_our_key(
    client: Client, gpu1: Remote, sshd: Sshd
) -> None:
    (sshd.home / ".ssh/authorized_keys").unlink()
    sshd.new_host_key()
    trusted = commands.trust(client.project, "gpu1")
    assert "refuses your key" in trusted.notes[0]
    added = commands.add(
        client.project,
        "gpu1",
        sshd.line,
        identity=client.key,
        install_key=True,
        ask=lambda _: PASSWORD,
    )
    assert added.known
    assert Remote("gpu1", client.inventory).run("echo hi").stdout == "hi\n"


def test_trust_mends_an_inventory_that_was_moved(client: Client, gpu1: Remote) -> None:
    (client.inventory / "known_hosts/gpu1").unlink()
    subprocess.run(
        ["ssh", "-F", gpu1.config, "-O", "exit", "gpu1"], capture_output=True, check=False
    )
    remote = Remote("gpu1", client.inventory)
    with pytest.raises(TunesmithError, match="no host key is pinned"):
        remote.run("true")
    commands.trust(client.project, "gpu1")
    assert Remote("gpu1", client.inventory).run("echo hi").stdout == "hi\n"


def test_a_known_host_on_a_new_port_gets_the_new_address(
    client: Client, gpu1: Remote, sshd: Sshd
) -> None:
    sshd.stop()
    sshd.port = free_port()
    sshd.start()
    with pytest.raises(TunesmithError, match="is off"):
        gpu1.run("true")
    added = commands.add(client.project, "gpu1", sshd.line, identity=client.key)
    assert added.known
    assert Remote("gpu1", client.inventory).run("echo hi").stdout == "hi\n"


def test_two_hosts_with_one_key_are_noted(
    client: Client, gpu1: Remote, sshd: Sshd, second: Sshd
) -> None:
    second.stop()
    shutil.copy(sshd.folder / "host_key", second.folder / "host_key")
    second.start()
    second.authorize(client.key)
    added = commands.add(client.project, "gpu2", second.line, identity=client.key)
    assert "the same host key as gpu1" in added.notes[0]


# The password, typed once.


def everything_said_in_proc(word: bytes, stop: threading.Event, hits: list[str]) -> None:
    """Look for a word in every command line and environment, until told to stop."""
    while not stop.is_set():
        for file in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
            with contextlib.suppress(OSError):
                if word in file.read_bytes():
                    hits.append(str(file))
        time.sleep(0.01)


def test_install_key_takes_the_password_once_and_shows_it_nowhere(
    client: Client, sshd: Sshd
) -> None:
    """This process holds it, too: the password is typed here, not given on its command line."""
    existing = sshd.home / ".ssh/authorized_keys"
    existing.parent.mkdir(mode=0o700)
    existing.write_text("ssh-ed25519 AAAAother without an end")
    questions: list[str] = []

    def ask(question: str) -> str:
        questions.append(question)
        return PASSWORD

    stop, hits = threading.Event(), []
    watcher = threading.Thread(target=everything_said_in_proc, args=(b"canary", stop, hits))
    watcher.start()
    try:
        added = commands.add(client.project, "gpu1", sshd.line, install_key=True, ask=ask)
    finally:
        stop.set()
        watcher.join()
    assert hits == []
    assert questions == [f"password of root@127.0.0.1:{sshd.port}: "]
    assert added.installed == client.key
    lines = existing.read_text().splitlines()
    public = client.key.with_name("id_ed25519.pub").read_text().strip()
    assert lines == ["ssh-ed25519 AAAAother without an end", public]
    assert existing.stat().st_mode & 0o777 == 0o600
    assert "canary" not in "".join(sshd.commands())
    assert Remote("gpu1", client.inventory).run("echo hi").stdout == "hi\n"
    again = commands.add(client.project, "gpu1", sshd.line, identity=client.key, install_key=True)
    assert again.installed is None, "a key that works is not installed again"


@pytest.mark.parametrize("kind", ["password", "keyboard-interactive", "both"])
def test_every_way_to_ask_for_a_password(client: Client, sshd: Sshd, kind: str) -> None:
    """Debian's sshd asks through PAM; one that offers both ways asks twice when it is wrong."""
    if kind != "password":
        sshd.stop()
        sshd.extra = ["UsePAM yes", "KbdInteractiveAuthentication yes"]
        sshd.extra += ["PasswordAuthentication no"] if kind != "both" else []
        sshd.start()
    with pytest.raises(TunesmithError, match="refuses the password"):
        commands.add(client.project, "gpu1", sshd.line, install_key=True, ask=lambda _: "wrong")
    assert not (client.inventory / "hosts.yml").exists()
    assert not (sshd.home / ".ssh/authorized_keys").exists()
    added = commands.add(
        client.project, "gpu1", sshd.line, install_key=True, ask=lambda _: PASSWORD
    )
    assert added.installed == client.key


def test_a_key_is_made_where_there_is_none(client: Client, sshd: Sshd) -> None:
    shutil.rmtree(client.home / ".ssh")
    added = commands.add(
        client.project, "gpu1", sshd.line, install_key=True, ask=lambda _: PASSWORD
    )
    assert added.installed == client.key
    assert client.key.stat().st_mode & 0o777 == 0o600
    assert client.key.parent.stat().st_mode & 0o777 == 0o700
    assert added.notes[0] == f"made a key for you: {client.key}"


# The shell.


def test_script_stdin_arguments_and_environment_arrive_as_they_are(gpu1: Remote) -> None:
    odd = 'a\'b "c" $(touch x) \\ ü'
    done = gpu1.run(
        'printf "%s|" "$1" "$2" "$ODD" "$LC_ALL"; cat; exit 7',
        arguments=(odd, ""),
        stdin=f"{odd}\nno end",
        env={"ODD": odd},
    )
    assert done.returncode == 7
    assert done.stdout == f"{odd}||{odd}|C|{odd}\nno end"
    done = gpu1.run(
        'printf "%s|" "$1" "$ODD"; cat; echo oops >&2', arguments=(odd,), env={"ODD": odd}
    )
    assert done.stdout == f"{odd}|{odd}|", "without stdin a script reads nothing, not itself"
    assert done.stderr == "oops\n"
    assert gpu1.run("readlink /proc/self/fd/0").stdout == "/dev/null\n"


def test_secrets_of_a_script_are_in_no_command_line(gpu1: Remote, sshd: Sshd) -> None:
    look = "tr '\\0' ' ' </proc/$$/cmdline; cat >/dev/null"
    done = gpu1.run(look, stdin="canary", env={"TOKEN": "canary"})
    assert "canary" not in done.stdout
    assert "canary" not in "".join(sshd.commands())


def test_a_script_with_a_syntax_error_does_nothing(gpu1: Remote) -> None:
    done = gpu1.run("echo begun\nif")
    assert done.returncode != 0
    assert done.stdout == ""


def test_words_arrive_whole(gpu1: Remote) -> None:
    argv = gpu1.argv("printf", "%s|", "a b", "$HOME", "*")
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("a b|$HOME|*|")


def test_255_of_a_script_is_not_sshs(gpu1: Remote) -> None:
    assert gpu1.run("exit 255").returncode == 254
    assert gpu1.run("exit 255", stdin="x").returncode == 254


def test_a_script_that_does_not_end_is_ended(gpu1: Remote) -> None:
    began = time.monotonic()
    with pytest.raises(TunesmithError, match=r"no end after 1\.0 s"):
        gpu1.run("sleep 600", timeout=1)
    assert time.monotonic() - began < 120


def test_a_lost_connection_is_said(gpu1: Remote, sshd: Sshd) -> None:
    threading.Timer(1, sshd.stop).start()
    with pytest.raises(TunesmithError, match=r"connection to .* was lost"):
        gpu1.run("sleep 600")


def test_a_kept_connection_is_used(gpu1: Remote, sshd: Sshd) -> None:
    gpu1.run("true")
    logins = (sshd.folder / "log").read_text().count("Accepted publickey")
    began = time.monotonic()
    gpu1.run("true")
    print(f"one exec over the kept connection: {time.monotonic() - began:.3f} s")
    assert (sshd.folder / "log").read_text().count("Accepted publickey") == logins


def test_remove_ends_the_kept_connection(client: Client, gpu1: Remote) -> None:
    gpu1.run("true")
    socket_file = socket_of(gpu1.config, "gpu1")
    assert socket_file.is_socket()
    commands.remove(client.project, "gpu1")
    ends = time.monotonic() + 60
    while socket_file.exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert not socket_file.exists()


def test_an_unknown_host_is_misuse(client: Client) -> None:
    with pytest.raises(UsageError, match="no host 'gpu9'"):
        Remote("gpu9", client.inventory)


# As the user sees it: the printing functions, plain ssh, and a jump host.


def test_list_remove_and_plain_ssh(client: Client, sshd: Sshd, root: Path) -> None:
    sshd.authorize(client.key)
    own = client.home / ".ssh/config"
    own.write_text("Host *\n  LogLevel ERROR\n")
    start = (
        "from pathlib import Path; from tunesmith.cli import host as c;"
        "from tunesmith.cli.command import Session;"
        f"r = Session(Path({str(root)!r})); d = Session(r.root, dry=True);"
    )
    done = client.script(f"{start} c.list_.function(r); c.add.function(d, 'gpu1', {sshd.line!r})")
    assert done.returncode == 0, done
    assert done.stdout.startswith("no hosts yet;")
    assert "would probe root@127.0.0.1" in done.stdout
    assert not client.inventory.exists()
    done = client.script(f"{start} c.add.function(r, 'gpu1', {sshd.line!r}); c.list_.function(r)")
    assert done.returncode == 0, done
    assert "gpu1: added, host key pinned" in done.stdout
    assert f"root@127.0.0.1:{sshd.port}" in done.stdout
    run = "import subprocess; subprocess.run(['ssh', 'gpu1', 'echo plain ssh'], check=True)"
    done = client.script(run)
    assert "plain ssh" in done.stdout, done
    done = client.script(f"{start} c.trust.function(r, 'gpu1'); c.remove.function(r, 'gpu1')")
    assert "the pinned key is still its key" in done.stdout, done
    assert "is forgotten" in done.stdout
    assert own.read_text() == "Host *\n  LogLevel ERROR\n"
    assert commands.listed(client.project) == ()


def test_the_password_comes_from_stdin_where_there_is_no_terminal(
    client: Client, sshd: Sshd, root: Path
) -> None:
    code = (
        "from pathlib import Path; from tunesmith.cli import host as c;"
        "from tunesmith.cli.command import Session;"
        f"c.add.function(Session(Path({str(root)!r})), 'gpu1', {sshd.line!r}, install_key=True)"
    )
    done = client.script(code, stdin=f"{PASSWORD}\n")
    assert done.returncode == 0, done
    assert f"installed {client.key}.pub on gpu1" in done.stdout
    assert "canary" not in done.stdout + done.stderr


def test_hosts_added_at_once_are_all_there(client: Client, sshd: Sshd) -> None:
    """Of connections that come at once sshd drops some unheard (MaxStartups): they try again."""
    sshd.authorize(client.key)
    names = [f"gpu{number}" for number in range(int(os.environ.get("TUNESMITH_TEST_HOSTS", "14")))]
    processes = multiprocessing.get_context("fork")
    told: multiprocessing.Queue[str] = processes.Queue()

    def add(name: str) -> None:
        try:
            commands.add(client.project, name, sshd.line, identity=client.key)
            told.put("")
        except BaseException as error:
            told.put(f"{name}: {error!r}")
            raise

    adding = [processes.Process(target=add, args=(name,)) for name in names]
    for process in adding:
        process.start()
    said = [told.get(timeout=600) for _ in names]
    for process in adding:
        process.join(60)
    assert [line for line in said if line] == []
    assert set(inventory.read(client.inventory)) == set(names)
    lines = (client.home / ".ssh" / "config").read_text().splitlines()
    assert len([line for line in lines if line.startswith("Include ")]) == 1


def test_a_jump_host_keeps_its_own_settings(
    client: Client, sshd: Sshd, second: Sshd, root: Path
) -> None:
    """The alias leads through a jump host that only the user's ~/.ssh/config knows."""
    sshd.authorize(client.key)
    second.authorize(client.key)
    (client.home / ".ssh/config").write_text(
        f"Host gate\n  HostName 127.0.0.1\n  Port {second.port}\n  User root\n"
        f"Host rented\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User root\n  ProxyJump gate\n"
    )
    code = (
        "import json; from pathlib import Path; from tunesmith.hosts import commands;"
        "from tunesmith.project import Project; from tunesmith.hosts.remote import Remote;"
        f"p = Project.at(Path({str(root)!r}));"
        "a = commands.add(p, 'gpu1', 'ssh rented');"
        "d = Remote('gpu1', p.inventory).run('echo $SSH_CONNECTION');"
        "print(json.dumps([a.host.address, a.host.jump, d.stdout]))"
    )
    done = client.script(code)
    assert done.returncode == 1
    assert "the jump host gate does not let us through" in done.stderr
    known = client.home / ".ssh/known_hosts"
    public = (second.folder / "host_key.pub").read_text()
    known.write_text(f"[127.0.0.1]:{second.port} {public}")
    done = client.script(code)
    assert done.returncode == 0, done
    address, jump, connection = json.loads(done.stdout)
    assert (address, jump) == (f"root@127.0.0.1:{sshd.port} through gate", "gate")
    assert connection.split()[3] == str(sshd.port)
    assert second.commands() == [], "on the jump host nothing runs"
    sshd.stop()
    done = client.script(
        "from pathlib import Path; from tunesmith.hosts import commands;"
        "from tunesmith.project import Project;"
        f"commands.trust(Project.at(Path({str(root)!r})), 'gpu1')"
    )
    assert "is off" in done.stderr, done


def test_a_hosts_agent_takes_no_code_from_where_ssh_lands(gpu1: Remote, sshd: Sshd) -> None:
    """A login lands in the home folder, and the agent works in tunesmith's: both hold traps."""
    mark, base = sshd.folder / "mark", sshd.home / "tunesmith"
    for folder in (sshd.home, base, base / "runs" / "r1"):
        traps.lay(folder, mark)
    (base / "state.json").write_text("{}")
    (base / "env.sh").write_text(f"export PYTHONPATH=:{sshd.home}\n")
    environment = base / "envs" / "one"
    overlaid(Path(sys.executable), environment)
    (environment / ".tunesmith-environment.json").write_text("{}")
    assert agent.call(gpu1, "runs", reply=RunList).runs == ()
    assert traps.sprung(mark) == ""
