"""Which command makes or brings a file of a run again. Standard library and yaml only."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from tunesmith.core.files import read_json
from tunesmith.job.run import manifest as run_manifest
from tunesmith.job.run.folder import COPY_FILE

SEALS = "seals.json"


def part(name: str) -> str:
    """Return the result that a file belongs to: its folder, or itself."""
    return name.partition("/")[0]


def again(run_dir: Path, name: str) -> str:
    """Return in words the command that makes or brings a file again."""
    run = run_dir.name
    if host := brought_from(run_dir, name):
        what = run_manifest.part_of(name)
        asked = f" --what {what}" if what in run_manifest.PARTS else ""
        return f"`inv pull --on {host} --run {run}{asked}` brings it again"
    made_by = part(name)
    if made_by in ("merged", "parity.json", "proof.json"):
        return f"`inv merge --run {run}` makes it anew"
    if made_by == "bundle":
        return f"`rm -r {quote(str(run_dir / made_by))}`, then `inv merge --run {run}` does without"
    if made_by == "export":
        chosen = Path(name).stem.removeprefix(f"{run}-") if name.endswith(".gguf") else ""
        quantise = f" --quantise {quote(chosen)}" if chosen else ""
        return f"`inv export --run {run} --format gguf{quantise}` makes it anew"
    if made_by == "export.json":
        return f"`rm {quote(str(run_dir / made_by))}`: the next `inv export` makes it anew"
    if made_by == SEALS:
        return f"`rm {quote(str(run_dir / SEALS))}` lets the results count as they are now"
    if made_by == "predict":
        return f"`inv predict --run {run} --config CONFIG` makes it anew"
    return f"put it back as it was, or begin a new run: {new_run(run_dir)}"


def new_run(run_dir: Path) -> str:
    """Return the command that begins a new run of a run's config."""
    try:
        config = quote(str(read_json(run_dir / "run.json")["config_file"]))
    except (OSError, ValueError, KeyError, TypeError):
        config = "CONFIG"
    return f"`inv train --config {config}`"


def is_copy(run_dir: Path) -> bool:
    """Whether a run lives on a host, and this is what was copied of it."""
    return (run_dir / COPY_FILE).is_file()


def brought_from(run_dir: Path, name: str) -> str | None:
    """Return the host that a file was pulled from; None for one that was made here."""
    if not is_copy(run_dir):
        return None
    copied = read_json(run_dir / COPY_FILE)
    return str(copied["from"]) if name in copied["files"] else None
