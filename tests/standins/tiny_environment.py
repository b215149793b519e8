"""Stand-ins for torch and LLaMA-Factory: wheels of a few lines, in an index on this disk.

The real ones are 8 GB. What is stood in for is their size alone: uv installs these as it does
those, from a hashed lock, and they answer what `tunesmith.job.system.versions` asks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

from tunesmith.stack.definition import Extra, Stack
from tunesmith.stack.environment import Environment

VERSION = "0.0.1"
_TORCH = """\
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
class version:
    cuda = None
def get_num_threads():
    return 1
"""
_LLAMAFACTORY = "def main():\n    import sys\n    print(sys.prefix)\n"
_PROGRAM = "[console_scripts]\nllamafactory-cli = llamafactory:main\n"


def environment(folder: Path, stack: Stack, build: int = 1) -> tuple[Stack, Environment, str]:
    """Return a stack whose lock holds the stand-ins, its environment, and the index's address.

    Another `build` is another lock for the same environment.
    """
    index = folder / "index"
    lines = [f"# build {build}\n"]
    for name, module in (("torch", _TORCH), ("llamafactory", _LLAMAFACTORY)):
        digest = _wheel(index / name, name, module)
        lines.append(f"{name}=={VERSION} --hash=sha256:{digest}\n")
    lock = folder / "tiny.txt"
    lock.write_text("".join(lines), encoding="utf-8")
    flavour = dataclasses.replace(stack.flavour(), name="tiny", lock=lock, size_bytes=1_000_000)
    extras = {name: _extra(folder, index, stack.extras[name]) for name in ("galore", "badam")}
    small = dataclasses.replace(
        stack,
        llamafactory=VERSION,
        source_packages=(),
        default_flavour="tiny",
        flavours={"tiny": flavour},
        extras=extras,
    )
    return small, Environment(folder / "envs" / "tiny", flavour), index.as_uri()


def _extra(folder: Path, index: Path, extra: Extra) -> Extra:
    """Return an extra of one module; what a test wrote into its lock stays."""
    lock = folder / f"{extra.name}.txt"
    digest = _wheel(index / extra.name, extra.name, "")
    if not lock.exists():
        lock.write_text(f"{extra.name}=={VERSION} --hash=sha256:{digest}\n", encoding="utf-8")
    return dataclasses.replace(extra, lock=lock)


def _wheel(folder: Path, name: str, module: str) -> str:
    """Make a wheel and its page of the index; return the wheel's sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{VERSION}-py3-none-any.whl"
    info = f"{name}-{VERSION}.dist-info"
    if not wheel.exists():
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/__init__.py", module)
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n"
            archive.writestr(f"{info}/METADATA", about)
            kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            archive.writestr(f"{info}/WHEEL", kind)
            if name == "llamafactory":
                archive.writestr(f"{info}/entry_points.txt", _PROGRAM)
            archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    page = f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>\n'
    (folder / "index.html").write_text(page, encoding="utf-8")
    return digest
