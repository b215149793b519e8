"""The probe, run by real shells: it answers whole, in time, and leaves nothing behind."""

from __future__ import annotations

import http.server
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from support import lacking
from tests.unit.probes.recorded import parse
from tunesmith.doctor.facts import SECTIONS, Facts
from tunesmith.doctor.rules import PROGRAMS
from tunesmith.hosts.probe.installed import Environment
from tunesmith.hosts.probe.script import ProbeSettings, script

pytestmark = pytest.mark.contract

SMI = """\
#!/bin/sh
# Stand-in for nvidia-smi: answers a query field by field, as the real one does.
case $1 in
--query-gpu=*)
    line=
    for field in $(echo "${1#*=}" | tr , ' '); do
        case $field in
        driver_version) value=$DRIVER ;;
        compute_cap)
            if [ "$DRIVER" = 460.91.03 ]; then
                echo 'Field "compute_cap" is not a valid field to query.'
                exit 2
            fi
            value=8.9
            ;;
        memory.total) value='24564 MiB' ;;
        memory.used) value='1 MiB' ;;
        name) value='NVIDIA GeForce RTX 4090, 100% ours' ;;
        *) echo "Field \\"$field\\" is not a valid field to query." && exit 2 ;;
        esac
        line="$line${line:+, }$value"
    done
    printf '%s\\n%s\\n' "$line" "$line"
    ;;
--query-compute-apps=*) echo '41, 2048 MiB, /usr/bin/python3 a.py, b' ;;
esac
"""


def shells() -> list[list[str]]:
    """Return the commands that run a script from standard input, as far as they are here."""
    found = [["sh", "-s"]]
    found += [["dash", "-s"]] if shutil.which("dash") else []
    found += [["bash", "--posix", "-s"]] if shutil.which("bash") else []
    return [*found, ["busybox", "sh", "-s"]] if shutil.which("busybox") else found


def probe(
    home: Path,
    env: Mapping[str, str] | None = None,
    shell: list[str] | None = None,
    limit: int | None = None,
    root: str = "",
    **settings: Any,
) -> tuple[Facts, str]:
    """Run the probe in an environment that has nothing but HOME and PATH; return facts, text.

    `limit`: seconds until a program is cut off, so that a slow machine tells what a quick one
    does. `root` stands for /.
    """
    names = [section.SECTION for section in SECTIONS]
    text = script(names, ProbeSettings(programs=PROGRAMS, **settings))
    if limit:
        text = re.sub(r"\blimited \d+ ", f"limited {limit} ", text)
    head = f"TUNESMITH_PROBE_ROOT={shlex.quote(root)}\n"
    done = subprocess.run(
        shell or ["sh", "-s"],
        input=head + text,
        env={"HOME": str(home), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    return parse(done.stdout), done.stdout


def program(folder: Path, name: str, text: str) -> str:
    """Write an executable and return a PATH that has its folder first."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.mark.parametrize("shell", shells(), ids=lambda words: words[0])
def test_every_shell_tells_this_machine(tmp_path: Path, shell: list[str]) -> None:
    facts, _ = probe(tmp_path, shell=shell)
    assert facts.system.arch == os.uname().machine
    assert facts.system.kernel == os.uname().release
    assert abs(facts.system.epoch - time.time()) < 60
    assert (facts.user.uid, facts.user.home) == (os.getuid(), str(tmp_path))
    assert facts.resources.cpu_count == len(os.sched_getaffinity(0))
    assert facts.resources.memory_total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = facts.disks.disk(str(tmp_path))
    assert disk is not None
    assert abs(disk.free - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert facts.system.libc.startswith(("glibc 2.", "musl"))
    assert {"tar", "gzip"} <= set(facts.programs)
    assert facts.seconds < 300


def test_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text(":\n", encoding="utf-8")
    before = set(Path("/dev/shm").iterdir()), set(tmp_path.rglob("*"))
    probe(tmp_path, ca="-----BEGIN CERTIFICATE-----\n", urls=pairs("hf=http://127.0.0.1:9/"))
    assert before == (set(Path("/dev/shm").iterdir()), set(tmp_path.rglob("*")))


def test_a_gpu_and_who_uses_it(tmp_path: Path) -> None:
    path = program(tmp_path / "bin", "nvidia-smi", SMI)
    facts, text = probe(tmp_path, {"PATH": path, "DRIVER": "550.127.05"})
    assert [(g.name, g.capability) for g in facts.gpu.gpus] == [
        ("NVIDIA GeForce RTX 4090, 100% ours", "8.9")
    ] * 2
    assert facts.gpu.gpus[0].memory_total == 24564 << 20
    (process,) = facts.gpu_processes
    assert (process.pid, process.memory) == (41, 2 << 30)
    assert process.name == "/usr/bin/python3 a.py, b"
    assert "100%25 ours" in text, "a % is escaped"


def test_a_driver_from_before_compute_cap(tmp_path: Path) -> None:
    path = program(tmp_path / "bin", "nvidia-smi", SMI)
    facts, _ = probe(tmp_path, {"PATH": path, "DRIVER": "460.91.03"})
    assert [(g.driver, g.capability) for g in facts.gpu.gpus] == [("460.91.03", None)] * 2
    assert facts.gpu.gpus[0].memory_used == 1 << 20


def test_what_nvidia_smi_says_when_it_fails(tmp_path: Path) -> None:
    words = "Failed to initialize NVML: Unknown Error"
    path = program(tmp_path / "bin", "nvidia-smi", f"#!/bin/sh\necho '{words}'\necho x\nexit 255\n")
    facts, text = probe(tmp_path, {"PATH": path})
    assert (facts.gpu.gpus, facts.gpu.text) == ((), f"{words} x")
    assert f"nvidia_smi.text={words}%0Ax\n" in text


def test_a_hanging_nvidia_smi_and_a_slow_bashrc_are_cut_off(tmp_path: Path) -> None:
    path = program(tmp_path / "bin", "nvidia-smi", "#!/bin/sh\nsleep 600\n")
    (tmp_path / ".bashrc").write_text("sleep 600\n", encoding="utf-8")
    began = time.monotonic()
    facts, _ = probe(tmp_path, {"PATH": path}, limit=4)
    assert time.monotonic() - began < 300
    assert (facts.gpu.gpus, facts.gpu.text) == ((), "no answer within 20 s")
    assert facts.bashrc_seconds is not None
    assert 3.9 <= facts.bashrc_seconds < 300


def test_standard_input_stays_the_scripts(tmp_path: Path) -> None:
    """A program that reads its input must not eat the rest of the script."""
    path = program(tmp_path / "bin", "nvidia-smi", "#!/bin/sh\ncat >/dev/null\nexit 6\n")
    program(tmp_path / "bin", "python3", "#!/bin/sh\ncat\n")
    facts, _ = probe(tmp_path, {"PATH": path})
    assert facts.seconds < 300


def test_no_password_of_a_proxy_or_index_leaves_the_host(tmp_path: Path) -> None:
    (tmp_path / ".pip").mkdir()
    (tmp_path / ".pip/pip.conf").write_text(
        "[global]\nindex-url = https://u:canary@pip.example/s\n"
    )
    (tmp_path / ".condarc").write_text("channels:\n  - https://u:canary@conda.example/c\n")
    env = {
        "http_proxy": "http://me:canary@10.0.0.1:3128",
        "HTTPS_PROXY": "me:canary@10.0.0.1:3128",
        "UV_DEFAULT_INDEX": "https://u:canary@uv.example/s",
        "NO_PROXY": "localhost",
    }
    facts, text = probe(tmp_path, env)
    assert "canary" not in text
    assert facts.network.proxies == (
        ("http_proxy", "http://10.0.0.1:3128"),
        ("HTTPS_PROXY", "10.0.0.1:3128"),
    )
    assert facts.network.no_proxy == "localhost"
    urls = [
        url
        for source in (*facts.network.pip_indexes, *facts.network.condarcs)
        for url in source.urls
    ]
    assert urls == ["https://uv.example/s", "https://pip.example/s", "https://conda.example/c"]


def test_conda_and_python_are_found_without_starting_conda(tmp_path: Path) -> None:
    conda = tmp_path / "miniconda3"
    program(conda / "bin", "conda", "#!/bin/sh\nsleep 50\n")
    program(conda / "bin", "python", "#!/bin/sh\necho 3.12.3\n")
    (conda / "conda-meta").mkdir()
    (conda / "conda-meta/conda-24.4.0-py312h06a4308_0.json").touch()
    (conda / "conda-meta/conda-libmamba-solver-24.1.0-pyhd3eb1b0_0.json").touch()
    facts, _ = probe(tmp_path)
    own = str(conda / "bin")
    assert (f"{own}/conda", "24.4.0") in [(c.path, c.version) for c in facts.condas]
    assert (f"{own}/python", "3.12.3") in [(p.path, p.version) for p in facts.pythons]


def test_a_conda_without_a_record_is_asked(tmp_path: Path) -> None:
    program(tmp_path / "miniforge3/bin", "conda", "#!/bin/sh\necho conda 25.3.1\n")
    facts, _ = probe(tmp_path)
    assert (f"{tmp_path}/miniforge3/bin/conda", "25.3.1") in [
        (c.path, c.version) for c in facts.condas
    ]


def tree(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


MEMINFO = {"proc/meminfo": "MemTotal:       1056462976 kB\nMemAvailable:   912004120 kB\n"}


def test_limits_of_cgroup_v1(tmp_path: Path) -> None:
    own = "docker/ab"
    files = {
        "proc/self/cgroup": f"5:cpuacct,cpu:/{own}\n4:memory:/{own}\n1:name=systemd:/{own}\n",
        "sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit 9223372036854771712\n",
        f"sys/fs/cgroup/memory/{own}/memory.stat": "cache 9\nhierarchical_memory_limit 2147483648\n"
        "total_inactive_file 1000\n",
        f"sys/fs/cgroup/memory/{own}/memory.usage_in_bytes": "5000\n",
        f"sys/fs/cgroup/cpu,cpuacct/{own}/cpu.cfs_quota_us": "-1\n",
        f"sys/fs/cgroup/cpu,cpuacct/{own}/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
    }
    tree(tmp_path, files | MEMINFO)
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert (facts.resources.cgroup, facts.resources.cpu_limit, facts.resources.cpus) == (
        "v1",
        0.5,
        0.5,
    )
    assert (facts.resources.memory_limit, facts.resources.memory_used) == (2147483648, 4000)
    assert facts.resources.memory_total == 1056462976 << 10


def test_limits_of_cgroup_v1_seen_from_inside_a_container(tmp_path: Path) -> None:
    """The path is the host's, but what is mounted is the container's own group."""
    files = {
        "proc/self/cgroup": "4:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n",
        "sys/fs/cgroup/memory/memory.stat": "hierarchical_memory_limit 2147483648\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1600000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    tree(tmp_path, files | MEMINFO)
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert (
        facts.resources.cpu_limit,
        facts.resources.memory_limit,
        facts.resources.memory_used,
    ) == (16.0, 2147483648, 5000)


def test_limits_of_cgroup_v2_are_the_tightest_above(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/kubepods/pod1/ab\n",
        "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
        "sys/fs/cgroup/kubepods/pod1/ab/cpu.max": "max 100000\n",
        "sys/fs/cgroup/kubepods/pod1/ab/memory.max": "max\n",
        "sys/fs/cgroup/kubepods/pod1/ab/memory.current": "5000\n",
        "sys/fs/cgroup/kubepods/pod1/ab/memory.stat": "anon 3\ninactive_file 1000\n",
        "sys/fs/cgroup/kubepods/pod1/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/kubepods/pod1/memory.max": "4294967296\n",
        "sys/fs/cgroup/kubepods/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/kubepods/memory.max": "8589934592\n",
    }
    tree(tmp_path, files | MEMINFO)
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert (facts.resources.cgroup, facts.resources.cpu_limit) == ("v2", 2.5)
    assert (facts.resources.memory_limit, facts.resources.memory_used) == (4294967296, 4000)


def test_a_data_disk_of_its_own_comes_first(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/mounts": "/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 /data ext4 rw 0 0\n"})
    (tmp_path / "workspace").mkdir()
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert facts.places.data_disk == f"{tmp_path}/workspace", "the only one there"
    (tmp_path / "data").mkdir()
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert facts.places.data_disk == f"{tmp_path}/data", "a mount"
    assert (facts.places.base, facts.places.writable) == (f"{tmp_path}/data/tunesmith", True)


def test_without_a_data_disk_it_is_home(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/mounts": "/dev/sda1 / ext4 rw 0 0\n"})
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert (facts.places.data_disk, facts.places.base) == (str(tmp_path), f"{tmp_path}/tunesmith")


def test_an_environment_is_whole_with_its_marker(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/mounts": "\n"})
    env = tmp_path / "tunesmith/envs/llama-factory"
    env.mkdir(parents=True)
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert facts.environment == Environment(str(env), whole=False)
    (env / ".tunesmith-environment.json").write_text('{\n  "flavour": "cu126"\n}\n')
    (tmp_path / "tunesmith/state.json").touch()
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert facts.environment == Environment(str(env), whole=True, flavour="cu126")
    assert facts.places.provisioned == f"{tmp_path}/tunesmith"


def test_container_hints(tmp_path: Path) -> None:
    files = {
        ".dockerenv": "",
        "proc/1/cgroup": "4:memory:/kubepods/x\n",
        "proc/1/comm": "bash\n",
        "proc/mounts": "overlay / overlay rw 0 0\n",
    }
    tree(tmp_path, files)
    facts, _ = probe(tmp_path, root=str(tmp_path))
    assert facts.system.container == ("dockerenv", "cgroup", "overlay")
    assert (facts.system.pid1, facts.system.systemd) == ("bash", False)


class Handler(http.server.BaseHTTPRequestHandler):
    """A mirror with moods, told by the path."""

    def do_HEAD(self) -> None:
        moods = {"/no-head": 405, "/gone": 404, "/moved": 302}
        self.send_response(moods.get(self.path, 200))
        if self.path == "/moved":
            self.send_header("Location", "/here")
        self.end_headers()

    def do_GET(self) -> None:
        assert self.headers["Range"] == "bytes=0-0"
        self.send_response(206)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def pairs(words: str) -> tuple[tuple[str, str], ...]:
    """Return the (kind, URL) of words "kind=url"."""
    return tuple((kind, url) for kind, _, url in (word.partition("=") for word in words.split()))


def outcomes(facts: Facts) -> dict[str, str]:
    return {t.kind: f"{t.outcome} {t.status or '-'}" for t in facts.mirrors}


def test_mirrors_are_tried_together_and_each_outcome_is_told(
    tmp_path: Path, mirror: str, silent: str
) -> None:
    urls = f"a={mirror}/here b={mirror}/gone c={mirror}/no-head d={mirror}/moved e={silent}/x "
    urls += "f=http://127.0.0.1:9/x g=http://nowhere.invalid/ h=http://127.0.0.1:9/*?[a]=b"
    facts, _ = probe(tmp_path, urls=pairs(urls))
    assert outcomes(facts) == {
        "a": "ok 200",
        "b": "http 404",
        "c": "ok 206",
        "d": "ok 200",
        "e": "timeout -",
        "f": "refused -",
        "g": "dns -",
        "h": "refused -",
    }
    assert [t.url for t in facts.mirrors if t.kind == "h"] == ["http://127.0.0.1:9/*?[a]=b"]
    assert facts.seconds < 300


NEEDED = ("sed", "cat", "tr", "grep", "df", "id", "uname", "date", "timeout", "mktemp", "nproc")


@pytest.mark.parametrize("tool", ["wget", "python3", ""])
def test_without_curl_another_program_asks(
    tmp_path: Path, mirror: str, silent: str, tool: str
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (*NEEDED, *filter(None, [tool])):
        place = shutil.which(name, path="/usr/bin:/bin")
        if place is None:
            lacking(f"no {name} here", f"apt-get install {name}")
        (folder / name).symlink_to(place)
    urls = f"a={mirror}/here b={mirror}/gone e={silent}/x f=http://127.0.0.1:9/x "
    urls += "g=http://nowhere.invalid/"
    shell = [shutil.which("sh") or "/bin/sh", "-s"]
    facts, _ = probe(tmp_path / "home", {"PATH": str(folder)}, shell, 100, urls=pairs(urls))
    told = ["ok 200", "http 404", "timeout -", "refused -", "dns -"]
    expected = dict(zip("abefg", told if tool else ["no_tool -"] * 5, strict=True))
    assert outcomes(facts) == expected


def test_an_unknown_authority_is_told_and_a_bundle_mends_it(tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        lacking("no openssl here", "apt-get install openssl")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    argv += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*argv, "-keyout", key, "-out", cert], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"pypi=https://127.0.0.1:{server.server_port}/here"
    try:
        assert outcomes(probe(tmp_path, urls=pairs(url))[0]) == {"pypi": "tls -"}
        trusted, _ = probe(tmp_path, urls=pairs(url), ca=cert.read_text())
        assert outcomes(trusted) == {"pypi": "ok 200"}
    finally:
        server.shutdown()
        server.server_close()


def test_mirrors_are_reached_through_the_proxy_that_the_mirror_names(
    tmp_path: Path, mirror: str
) -> None:
    facts, _ = probe(tmp_path, urls=pairs("hf=http://far.invalid/here"), proxy=mirror)
    assert outcomes(facts) == {"hf": "ok 200"}, "a name only the proxy could know"
