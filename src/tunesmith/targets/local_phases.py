"""What was done here with a pulled run, kept when the host's record of it comes again.

A pulled run may be merged, proven or asked here. Its status, events and log then have both: the
host's as they were pulled, and what was added here. A later pull brings what the host has done
since, and puts behind it what was added here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.core.files import replacing, write_json
from tunesmith.job.run.codec import encode
from tunesmith.job.run.events import RunStarted, parse
from tunesmith.job.run.folder import MERGED, RunFolder
from tunesmith.job.run.schema import FileRecord, RunStatus

# The phases whose results are a part of a pull: with the host's files comes its word for them.
PHASES_OF = {MERGED: frozenset({"merge", "proof"}), "predict": frozenset({"predict"})}
# A state in which a phase stays; others are those of work that ended without a word.
_ENDED = ("succeeded", "failed", "stopped")


@dataclass(frozen=True)
class Worked:
    """What was done here: the phases, and what was added to events and log."""

    phases: Set[str]
    events: bytes
    log: bytes


def worked(
    here: Path, fresh: Path, had: Mapping[str, FileRecord], brought: Iterable[str]
) -> Worked | None:
    """Return what was done in `here`, a pulled run, and still counts; None for nothing.

    `fresh` is the folder with the host's files as they are now, `had` what the last pull copied.
    `brought` are the parts that come from the host now: what was done here for them is over.
    """
    run, theirs = RunFolder(here), RunFolder(fresh)
    events = _added(run.events_file, theirs.events_file, had)
    if events is None:
        return None  # another run of that name: nothing was done with it
    gone: set[str] = set().union(*(PHASES_OF.get(part, ()) for part in brought))
    phases: set[str] = set()
    kept = b""
    for asked, lines in _calls(events):
        if not asked or asked - gone:
            phases |= asked
            kept += lines
    phases -= gone
    if not kept:
        return None
    # A merged model has the proof that was made of it, or none.
    phases |= PHASES_OF[MERGED] if "merge" in phases else set()
    return Worked(phases, kept, _added(run.log_file, theirs.log_file, had) or b"")


def put(done: Worked, here: Path, fresh: Path, names: Set[str]) -> list[str]:
    """Add what was done in `here` to the host's files in `fresh`; `names` are those that came.

    Returns the phases whose state is now that of here.
    """
    run, theirs = RunFolder(here), RunFolder(fresh)
    for file, added in ((theirs.events_file, done.events), (theirs.log_file, done.log)):
        if file.name in names and added:
            with replacing(file) as part:
                part.write_bytes(file.read_bytes() + added)
    if theirs.status_file.name not in names:
        return []
    status = _joined(run.status(), theirs.status(), done.phases)
    write_json(theirs.status_file, encode(status))
    return [phase for phase in status.phases if phase in done.phases]


def _joined(ours: RunStatus, theirs: RunStatus, phases: Set[str]) -> RunStatus:
    """Return the host's status, with our word for the `phases` that were done here."""
    states = {name: state for name, state in theirs.phases.items() if name not in phases}
    states |= {
        name: state for name, state in ours.phases.items() if name in phases and state in _ENDED
    }
    status = replace(theirs, phases=states)
    # The host's failure counts, unless it was in a phase that was done anew here.
    open_here = theirs.state == "succeeded" or theirs.phase in phases
    if open_here and ours.phase in phases and ours.state in _ENDED:
        return replace(
            status,
            state=ours.state,
            phase=ours.phase,
            failure=ours.failure,
            message=ours.message,
            detail=ours.detail,
        )
    return status


def _added(ours: Path, theirs: Path, had: Mapping[str, FileRecord]) -> bytes | None:
    """Return what was added here to a file that only grows.

    None when the host's is another one than that of which ours has the beginning.
    """
    copied = had[ours.name].size if ours.name in had else 0
    here = ours.read_bytes() if ours.is_file() else b""
    there = theirs.read_bytes() if theirs.is_file() else b""
    if here[:copied] == there[:copied]:
        return here[copied:]
    # A line that a power loss had torn is cut off before anything is added.
    same = 0
    both = (content[:copied].splitlines(keepends=True) for content in (here, there))
    for ours_line, theirs_line in zip(*both, strict=False):
        if ours_line != theirs_line:
            break
        same += len(ours_line)
    return here[same:] if same else None


def _calls(events: bytes) -> list[tuple[set[str], bytes]]:
    """Divide whole lines of events into calls: the phases each was asked for, and its lines."""
    found: list[tuple[set[str], bytes]] = []
    for line in events[: events.rfind(b"\n") + 1].splitlines(keepends=True):
        text = line.strip(b"\0 \n")
        event = parse(text, 0) if text else None
        if isinstance(event, RunStarted):
            found.append((set(event.phases), b""))
        elif not found:
            found.append((set(), b""))
        asked, lines = found[-1]
        found[-1] = (asked, lines + line)
    return found
