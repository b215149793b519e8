"""A rented host in a folder: a home, a data disk, stand-ins for conda and nvidia-smi.

Ansible (connection local), sh, uv, pip and its index protocol are real; the lock is a small
one, of wheels made here. Whole hosts with the real lock are in tests/host.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.unit.test_playbook_filters import plugin

CONDA = """#!/bin/sh
# Stand-in for conda: environments by venv, and the few subcommands that the roles use.
echo "$*" >>"$HOME/conda.log"
case $1 in
create)
    while [ $# -gt 1 ]; do
        [ "$1" = --prefix ] && prefix=$2
        [ "$1" = --channel ] && channel=$2
        shift
    done
    case $* in *cuda-cudart-dev=*)
        version=${1##*=}
        mkdir -p "$prefix/bin"
        echo "echo Cuda compilation tools, release $version, V$version.1" >"$prefix/bin/nvcc"
        chmod +x "$prefix/bin/nvcc"
        exit
        ;;
    esac
    case $channel in *broken*) echo "UnavailableInvalidChannel: $channel" >&2; exit 1 ;; esac
    exec {python} -m venv "$prefix"
    ;;
config)
    case $2 in
    --append) printf 'envs_dirs:\\n  - %s\\n' "$4" >"$HOME/.condarc" ;;
    --remove) rm "$HOME/.condarc" ;;
    esac
    ;;
*) exit 2 ;;
esac
"""

SMI = """#!/bin/sh
# Stand-in for nvidia-smi: says what the file says.
cat "$HOME/gpus"
"""

# Of a torch the self-test needs only its verdict: the one that fails sees no GPU, the one
# that works ends the test with success.
TORCH_FAILS = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
TORCH_WORKS = "raise SystemExit(0)\n"


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> str:
    """Make a wheel; return its line for a lock."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if name == "llamafactory":
        entry = "[console_scripts]\nllamafactory-cli = llamafactory:main\n"
        contents[f"{info}/entry_points.txt"] = entry
    contents[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in contents.items():
            # A fixed time: the same wheel has the same hash whenever it is made.
            archive.writestr(zipfile.ZipInfo(file), text)
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@contextmanager
def index(folder: Path) -> Iterator[str]:
    """Serve the wheels of a folder as a package index; the file `asked` there has its requests."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = re.match(r"^/simple/([a-z0-9-]+)/$", self.path)
            if not asked:
                return super().do_GET()
            files = sorted(folder.glob(f"{asked[1]}-*.whl"))
            page = "".join(f'<a href="/{file.name}">{file.name}</a>' for file in files).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return None

        def log_message(self, *_: Any) -> None:
            with (folder / "asked").open("a") as log:
                log.write(f"{self.path}\n")

    def handler(*arguments: Any) -> Handler:
        return Handler(*arguments, directory=str(folder))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()


@dataclass
class Played:
    """What a playbook did: `changed` and `failed` from its recap, and all it printed."""

    text: str
    changed: int
    failed: int


@dataclass
class Rented:
    """The host. `variables` are the extra variables of each run."""

    root: Path
    folder: Path
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def base(self) -> Path:
        return self.disk / "tunesmith"

    @property
    def environment(self) -> Path:
        return self.base / "envs" / "llama-factory"

    @property
    def marker(self) -> dict[str, str]:
        text = (self.environment / ".tunesmith-environment.json").read_text(encoding="utf-8")
        return json.loads(text)

    def gpus(self, *lines: str) -> None:
        (self.home / "gpus").write_text("".join(f"{line}\n" for line in lines))

    def conda_calls(self, verb: str) -> int:
        log = self.home / "conda.log"
        return log.read_text().count(f"{verb} ") if log.exists() else 0

    def play(self, name: str, *options: str, **variables: Any) -> Played:
        """Run a playbook; it is for the test to judge how it ended."""
        with self.start(name, *options, **variables) as process:
            text = process.communicate()[0]
        recap = re.search(r"gpu1 +: ok=\d+ +changed=(\d+) +unreachable=\d+ +failed=(\d+)", text)
        assert recap, text
        return Played(text, int(recap[1]), int(recap[2]))

    def start(self, name: str, *options: str, **variables: Any) -> subprocess.Popen[str]:
        """Start a playbook as the leader of a process group."""
        extra = self.folder / "extra.json"
        extra.write_text(json.dumps(self.variables | variables))
        argv = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("--inventory", str(self.folder / "hosts.yml"), "--extra-vars", f"@{extra}"),
            *(str(self.root / "ansible" / "playbooks" / f"{name}.yml"), *options),
        ]
        environment = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(self.root / "ansible" / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONWARNINGS": "ignore",
        }
        return subprocess.Popen(
            argv,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def probe(self, *prefix: str) -> str:
        """Return what the probe says; `prefix` runs it as somebody else, say."""
        text = plugin(self.root, "host").host_probe(
            [str(self.disk)], "", "llama-factory", ["flock", "tar"]
        )
        argv = [*prefix, "sh", "-s"]
        environment = {"HOME": str(self.home), "PATH": f"{self.folder / 'bin'}:{os.defpath}"}
        return subprocess.run(
            argv, input=text, env=environment, capture_output=True, text=True, check=True
        ).stdout

    def shell(self, *argv: str) -> str:
        """Return what a shell of the host's user prints."""
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "SSH_CLIENT": "x"}
        return subprocess.run(
            argv, env=environment, capture_output=True, text=True, check=True
        ).stdout


def rent(root: Path, folder: Path, python310: str, wheels: Path, index_url: str) -> Rented:
    """Make a host in an empty folder."""
    host = Rented(root, folder)
    conda = host.home / "miniconda3" / "bin" / "conda"
    smi = folder / "bin" / "nvidia-smi"
    for tool, text in ((conda, CONDA.replace("{python}", python310)), (smi, SMI)):
        tool.parent.mkdir(parents=True)
        tool.write_text(text)
        tool.chmod(0o755)
    host.disk.mkdir()
    host.gpus()
    (host.home / ".bashrc").write_text("case $- in *i*) ;; *) return ;; esac\necho interactive\n")
    inventory = {
        "gpu_hosts": {
            "hosts": {
                "gpu1": {
                    "ansible_connection": "local",
                    "ansible_python_interpreter": sys.executable,
                }
            }
        }
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    configs = folder / "configs"
    (configs / "locks").mkdir(parents=True)
    stack = yaml.safe_load((root / "configs/stack.yml").read_text(encoding="utf-8"))
    version = stack["training"]["llamafactory"]
    code = f"def main():\n    print('Welcome to LLaMA Factory, version {version}')\n"
    line = wheel(wheels, "llamafactory", version, {"llamafactory/__init__.py": code})
    for flavour, torch in (("cu128", TORCH_FAILS), ("cu126", TORCH_WORKS)):
        pins = dict(pin.split("==") for pin in stack["flavours"][flavour]["requirements"])
        files = {"torch.py": torch, "bitsandbytes/functional.py": ""}
        pin = wheel(wheels, "torch", pins["torch"], files)
        (configs / "locks" / f"{flavour}.txt").write_text(line + pin)
    for file in ("stack.yml", "locks/control.txt", "locks/build-constraints.txt"):
        (configs / file).write_bytes((root / "configs" / file).read_bytes())
    mirror = {
        "hf_endpoints": ["https://hf.example.com", "https://huggingface.co"],
        "pypi_indexes": [f"{index_url}/absent", index_url],
        "conda_channels": ["https://broken.example.com", "https://channel.example.com"],
        "miniforge_urls": ["https://miniforge.example.com"],
        "apt": [],
        "docker_registries": [],
    }
    (configs / "mirror.yml").write_text(yaml.safe_dump(mirror))
    host.variables = {
        "stack_file": str(configs / "stack.yml"),
        "mirror_file": str(configs / "mirror.yml"),
        "preflight_data_disks": [str(folder / "absent"), str(host.disk)],
        "preflight_free_bytes": 1_000_000,
        "preflight_free_inodes": 1000,
        # Nothing is installed on the machine that runs the tests.
        "base_missing": [],
    }
    return host
