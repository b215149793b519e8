"""A base model from this machine into a host's store, for hosts without a way to a hub.

rsync goes on where it was cut, in this call or a later one. The host takes a model only
when every file there has the sha256 it has here.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.basemodel import files as model_files
from tunesmith.basemodel import store as model_store
from tunesmith.core import disk, formats, isolated
from tunesmith.core.callbacks import Bar, OnText, unseen
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import sha256_of
from tunesmith.hosts import replies, transfer
from tunesmith.hosts.answers import DIGEST, AnswerSource, Named, Number, Record, Words, parse_json
from tunesmith.hosts.layout import Layout
from tunesmith.hosts.remote import Remote
from tunesmith.job.run.replies import Refusal

# sha256sum and the copying of a large model on a slow disk.
_TAKE_SECONDS = 3600.0

_MANIFEST = Record({"files": Named(Words(500), Record({"sha256": DIGEST}))})


def send(
    remote: Remote,
    layout: Layout,
    name: str,
    folder: Path,
    tell: OnText,
    bar: Bar = unseen,
) -> None:
    """Bring the base model `name` from a folder here into the store of a host.

    One that is there already is not sent again. `bar` shows the upload. Raises UsageError for a
    folder that is no whole base model, other weights than configs/models.yml has for the name,
    or too small a disk; TunesmithError when what arrived is not what was sent.
    """
    model_files.require(folder, name)
    names = model_files.choose(path.name for path in folder.iterdir())
    size = sum((folder / file).stat().st_size for file in names)
    tell(f"base model: reading {folder} ({formats.size(size)})")
    hashes = _hashes(folder, names, size, bar)
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    upload = str(layout.base / "uploads" / "models" / key)
    there, sent = _look(remote, layout, name, upload)
    if hashes in there:
        tell(f"base model: {name} is on {remote.name} already")
        return
    # The store gets a copy, and the upload goes when that is whole.
    needed = 2 * size - min(sent, size)
    disk.require(
        f"{remote.name}:{layout.base}",
        needed,
        f"the upload of {name}",
        free=layout.free_bytes,
        hint="free space there, e.g. with `inv rm RUN --on HOST`",
    )
    tell(f"base model: uploading what is not yet on {remote.name}")
    with bar("uploading") as moved:
        transfer.upload(remote, {file: folder / file for file in names}, upload, tell, moved)
    tell(f"base model: reading what arrived on {remote.name}")
    with bar("reading"):
        _prove(remote, upload, hashes)
        _take(remote, layout, name, upload)
    tell(f"base model: {name} is on {remote.name}, every file with the sha256 it has here")


def _hashes(folder: Path, names: Sequence[str], size: int, bar: Bar) -> dict[str, str]:
    """Return the sha256 of files of `size` bytes together, by name."""
    done = 0
    with bar("reading") as moved:

        def read(count: int) -> None:
            nonlocal done
            done += count
            moved(done, size)

        return {name: sha256_of(folder / name, read) for name in names}


def _look(
    remote: Remote, layout: Layout, name: str, upload: str
) -> tuple[list[dict[str, str]], int]:
    """Return the sha256 of the files of each copy in the store, and the bytes of the upload."""
    store = shlex.quote(str(layout.models / model_store.safe_name(name)))
    script = (
        f"for manifest in {store}@*/{model_store.MANIFEST}; do\n"
        '    [ -f "$manifest" ] && tr -d \'\\n\' <"$manifest" && echo\n'
        "done\n"
        f"du -sk {shlex.quote(upload)} 2>/dev/null | cut -f1"
    )
    copies: list[dict[str, str]] = []
    sent = 0
    for line in remote.run(script).stdout.splitlines():
        if line.isdigit():
            sent = (
                Number(0, 1 << 50).read(AnswerSource(remote.name, "the upload's size"), line) * 1024
            )
        elif line.startswith("{"):
            asked = AnswerSource(remote.name, f"the manifest of {name}")
            files = _MANIFEST.read(asked, parse_json(asked, line))["files"]
            copies.append({file: record["sha256"] for file, record in files.items()})
    return copies, sent


def _prove(remote: Remote, upload: str, hashes: Mapping[str, str]) -> None:
    """Compare what arrived; what is wrong is removed there, so that it is sent again."""
    script = f"cd {shlex.quote(upload)} && sha256sum -c -"
    lines = "".join(f"{sha256}  {file}\n" for file, sha256 in hashes.items())
    done = remote.run(script, stdin=lines, timeout=_TAKE_SECONDS)
    if done.returncode == 0:
        return
    good = {line.removesuffix(": OK") for line in done.stdout.splitlines() if line.endswith(": OK")}
    wrong = sorted(hashes.keys() - good)
    remote.run(f"cd {shlex.quote(upload)} && rm -f -- {shlex.join(wrong)}")
    raise TunesmithError(
        f"{remote.name}: {wrong[0]} did not arrive as it is here; the same command sends it again",
        wrong,
    )


def _take(remote: Remote, layout: Layout, name: str, upload: str) -> None:
    words = ["fetch", name, "--store", str(layout.models), "--hf-home", str(layout.hf_home)]
    words += ["--mirror", layout.mirror, "--from", upload]
    script = (
        f". {shlex.quote(str(layout.variables))}\n"
        f"exec {shlex.join(isolated.argv(layout.python, 'tunesmith.basemodel', *words))}"
    )
    done = remote.run(script, timeout=_TAKE_SECONDS)
    if done.returncode != 0:
        kind = UsageError if done.returncode == UsageError.exit_code else TunesmithError
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            told = done.stderr.splitlines()[-3:]
            raise kind(f"{remote.name}: the model was not accepted there", told)
        asked = AnswerSource(remote.name, f"its refusal of {name}")
        refusal = replies.read(asked, Refusal, parse_json(asked, lines[-1]))
        raise kind(f"{remote.name}: {refusal.error}", refusal.detail, hint=refusal.hint)
    remote.run(f"rm -rf {shlex.quote(upload)}")
