"""What a client asks of a host's runs.

`python -m tunesmith.job.supervisor.agent --runs DIR VERB ...`:

create             make a run: a RunOrder on stdin
renew RUN          give an idle run another request: a RunOrder on stdin
start RUN [PHASE]  start its phases, detached; a run that waits for its turn has started;
                   --cause says why (CAUSES)
stop RUN           ask it for a checkpoint and an end
find [RUN]         the id of a run, by default the newest
show RUN           request, config and status
runs               all runs, oldest first
watch RUN          a line whenever something changes, until the run has ended
manifest RUN       what a pull brings
remove RUN         delete an idle run
afterwards RUN     a CommandOrder on stdin, run once, after a success
resume-all         start the runs that a restart of the host has cut off; --cause says why,
                   by default autostart: the host's own start asks

Orders and answers are the types of job/run/replies.py: an answer is one line of JSON on stdout
(watch: many; manifest: lines {"hashing", "total"} before it). What is refused is a Refusal, with
exit code 2 (nothing was changed) or 1. Standard library and yaml only, so that an answer takes a
tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import fsync_folder, locked, sha256_of, write_json, write_text
from tunesmith.job.run import inputs, limits, seals
from tunesmith.job.run.codec import Fault, decode, encode
from tunesmith.job.run.folder import RunFolder, acquire
from tunesmith.job.run.listing import find, folders, list_runs
from tunesmith.job.run.manifest import PARTS, USUAL, manifest, output_of
from tunesmith.job.run.removal import take_away
from tunesmith.job.run.replies import (
    CommandOrder,
    CommandResult,
    Manifest,
    Refusal,
    Removed,
    Resumed,
    RunList,
    RunNamed,
    RunOrder,
    RunShown,
    UploadedFile,
)
from tunesmith.job.run.run_id import RunId
from tunesmith.job.run.schema import CAUSES, Cause, FileRecord, RunInputs, RunRequest
from tunesmith.job.run.stored import parse_json
from tunesmith.job.run.watch import poll, watch
from tunesmith.job.supervisor import launch
from tunesmith.job.system import disk, gpu

# A folder of a create that was killed: older than any upload's last step takes.
_STALE_SECONDS = 3600.0

T = TypeVar("T")


def create(runs: Path, order: RunOrder) -> RunNamed:
    """Make a run folder whole, or none.

    Inputs are hard links to the uploaded files (copies where that cannot be), so what is
    uploaded later must replace those files, never write into them. Raises UsageError for a
    run that exists or an input that is not what was promised.
    """
    run_id = RunId(order.run_id)
    final = runs / run_id
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs / run_id):
        _sweep(runs)
    if final.exists():
        raise _exists(run_id)
    with tempfile.TemporaryDirectory(prefix=f".{run_id}.incoming-", dir=runs) as temporary:
        run = RunFolder(Path(temporary) / "run")
        run.path.mkdir()
        taken = {
            run.path / "inputs" / name: _take_input(run.path / "inputs", name, record)
            for name, record in order.inputs.items()
        }
        if order.config is not None:
            body = yaml.safe_dump(order.config, allow_unicode=True, sort_keys=True)
            write_text(run.config_file, body)
        request = _recorded(order, taken, run.path, final)
        write_json(run.request_file, encode(request))
        seals.seal(run.path, "create", seals.REQUEST)
        try:
            # Over a folder with files in it a rename fails: of two creates one succeeds.
            run.path.rename(final)
        except OSError:
            if not final.exists():
                raise
            raise _exists(run_id) from None
    fsync_folder(runs)
    inputs.remember(final, request, request.inputs)
    inputs.remember_model(final, request.model)
    return RunNamed(run_id)


def _recorded(order: RunOrder, taken: dict[Path, FileRecord], now: Path, final: Path) -> RunRequest:
    """Return the request with the record of its inputs, which get their final name later."""
    request = decode(RunRequest, _moved(encode(order.request), final, now))
    made = inputs.recorded(request, _moved(order.config, final, now), taken).inputs
    moved = {
        name: decode(RunInputs, _moved(encode(part), now, final)) for name, part in made.items()
    }
    return replace(order.request, inputs=moved)


def _moved(value: Any, old: Path, new: Path) -> Any:
    """Return a value of JSON whose paths below `old` are below `new`; a key may list several."""
    if isinstance(value, dict):
        return {_moved(k, old, new): _moved(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    inside = f"{old}/"
    return ",".join(
        f"{new}/{part[len(inside) :]}" if part.startswith(inside) else part for part in parts
    )


def renew(run: RunFolder, order: RunOrder) -> RunNamed:
    """Replace run.json, and inputs, of a run nobody works in; UsageError when somebody does."""
    run.request()
    lock = acquire(run)
    try:
        taken = {
            run.path / "inputs" / name: _take_input(run.path / "inputs", name, record)
            for name, record in order.inputs.items()
        }
        request = inputs.recorded(order.request, None, taken)
        with seals.rewriting(run.path, "renew", run.request_file.name):
            write_json(run.request_file, encode(request))
        inputs.remember(run.path, request, inputs.lacking(order.request, None))
    finally:
        lock.release()
    return RunNamed(run.run_id)


def show(run: RunFolder) -> RunShown:
    """Return request, config (None without one) and status of a run."""
    config = run.config() if run.config_file.exists() else None
    return RunShown(run.request(), run.status(), config)


def remove(runs: Path, run: RunFolder) -> Removed:
    """Delete a run nobody works in. Raises UsageError when somebody works in it."""
    output = output_of(run)
    doomed = runs / f".{run.run_id}.removed-{os.getpid()}"
    freed = take_away(run, doomed)
    with locked(doomed):
        # Another remove may have swept it up meanwhile.
        if doomed.exists():
            shutil.rmtree(doomed)
        _sweep(runs)
    outside = not output.is_relative_to(run.path) and output.is_dir()
    return Removed(freed, str(output) if outside else None)


def afterwards(run: RunFolder, order: CommandOrder) -> CommandResult:
    """Run a command after a run has succeeded, once. Raises UsageError when another run needs
    the host, the run has not succeeded, or its command was run before."""
    run.request()
    return CommandResult(*limits.once(run, list(order.command)))


def resume_all(runs: Path, cause: Cause = "autostart") -> Resumed:
    """Start every run that ended without a word: power loss, restart, kill -9.

    Those that worked come before those that waited for their turn, then the oldest first.
    One that worked on a GPU is refused while there is none: a host that was started without
    one, to fetch results, has no memory for it either.
    """
    cut_off = []
    started: list[str] = []
    refused: dict[str, str] = {}
    for folder in folders(runs):
        run = RunFolder(folder)
        # None for one that was made, but never started.
        left = run.last_status()
        if left is None or not left.active or run.busy():
            continue
        try:
            created = run.request().created
        except TunesmithError:
            continue  # damaged: `runs` shows it
        if left.gpu and not gpu.ask():
            refused[run.run_id] = _no_gpu(run)
            continue
        cut_off.append((left.state == "queued", created, run))
    for _, _, run in sorted(cut_off, key=lambda item: (*item[:2], item[2].run_id)):
        try:
            launch.start(run.path, [], cause)
        except TunesmithError as error:
            refused[run.run_id] = error.line
        else:
            started.append(run.run_id)
    return Resumed(tuple(started), refused)


def _no_gpu(run: RunFolder) -> str:
    return (
        f"run {run.run_id} worked on a GPU, and there is none now; start the host with one, or "
        f"`inv resume --run {run.run_id}`"
    )


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; return the exit code."""
    try:
        given = _parser().parse_args(argv)
        _serve(given)
    except BrokenPipeError:
        # The client is gone. Nothing more can be said, not even at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TunesmithError as error:
        _answer(Refusal(error.message, error.detail, error.hint))
        return error.exit_code
    except OSError as error:
        return _refused(error, given.runs)
    except Exception as error:  # noqa: BLE001 - the client understands JSON only
        traceback.print_exc()
        _answer(Refusal(f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _refused(error: OSError, runs: Path) -> int:
    """Say what the system refused: in one line where it is the disk's fault."""
    if disk.refused(error):
        _answer(Refusal(disk.explain(error, runs).message))
    else:
        traceback.print_exc()
        _answer(Refusal(f"{type(error).__name__}: {error}"))
    return 1


def _serve(given: argparse.Namespace) -> None:
    runs: Path = given.runs.absolute()
    verb: str = given.verb
    if verb in ("create", "runs", "resume-all"):
        whole: dict[str, Callable[[], object]] = {
            "create": lambda: create(runs, _stdin(RunOrder)),
            "runs": lambda: RunList(tuple(list_runs(runs))),
            "resume-all": lambda: resume_all(runs, given.cause),
        }
        _answer(whole[verb]())
        return
    run = find(runs, given.run)
    if verb == "watch":
        if given.once:
            _answer(poll(run, given.events, given.log))
            return
        until = time.monotonic() + given.seconds
        for snapshot in watch(run, given.events, given.log):
            _answer(snapshot)
            if time.monotonic() > until:
                return
        return
    answers: dict[str, Callable[[], object]] = {
        "renew": lambda: renew(run, _stdin(RunOrder)),
        "start": lambda: _launched(launch.start, run, list(given.phases), given.cause),
        "stop": lambda: _launched(launch.stop, run),
        "find": lambda: RunNamed(run.run_id),
        "show": lambda: show(run),
        "manifest": lambda: _sealed_manifest(run, given.what.split(",")),
        "remove": lambda: remove(runs, run),
        "afterwards": lambda: afterwards(run, _stdin(CommandOrder)),
    }
    _answer(answers[verb]())


class _Parser(argparse.ArgumentParser):
    """Refuses in the agent's own way: the client reads stdout."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tunesmith.job.supervisor.agent")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run folders")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("create", "runs"):
        verbs.add_parser(name)
    resuming = verbs.add_parser("resume-all")
    resuming.add_argument("--cause", choices=CAUSES, default="autostart")
    verbs.add_parser("find").add_argument("run", nargs="?")
    for name in ("renew", "start", "stop", "show", "watch", "manifest", "remove", "afterwards"):
        verb = verbs.add_parser(name)
        verb.add_argument("run")
        if name == "start":
            verb.add_argument("phases", nargs="*")
            verb.add_argument("--cause", choices=CAUSES, default="user")
        elif name == "watch":
            verb.add_argument("--events", type=int, default=0, help="byte of events.jsonl")
            verb.add_argument("--log", type=int, default=-1, help="byte of train.log; -1: none")
            verb.add_argument("--once", action="store_true", help="one line, then end")
            verb.add_argument("--seconds", type=float, default=math.inf, help="end after them")
        elif name == "manifest":
            known = ",".join(PARTS)
            verb.add_argument("--what", default=",".join(USUAL), help=f"of {known}")
    return parser


def _sealed_manifest(run: RunFolder, what: list[str]) -> Manifest:
    """Return what a pull brings, once every result in it was compared with its seal.

    A run that is worked on may be between a file and its seal.
    """
    sealed = seals.read(run.path)
    listed = manifest(run, what, _report_hashing, sealed.keys())
    if not listed.busy:
        seals.refuse_other(run.path, listed.files)
    return listed


def _launched(do: Callable[..., None], run: RunFolder, *arguments: object) -> RunNamed:
    do(run.path, *arguments)
    return RunNamed(run.run_id)


def _report_hashing(done: int, total: int) -> None:
    _write({"hashing": done, "total": total})


def _answer(reply: object) -> None:
    _write(encode(reply))


def _write(value: object) -> None:
    # UTF-8 whatever the host's locale; what is no text at all becomes an escape of JSON.
    line = json.dumps(value, ensure_ascii=False) + "\n"
    sys.stdout.buffer.write(line.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


def _stdin(kind: type[T]) -> T:
    try:
        value = parse_json(sys.stdin.buffer.read())
    except ValueError as error:
        raise UsageError(f"stdin is not JSON: {error}") from None
    try:
        return decode(kind, value)
    except Fault as fault:
        raise UsageError(f"stdin: {fault}") from None


def _exists(run_id: str) -> UsageError:
    return UsageError(f"run {run_id} is there already", hint="`inv runs` lists it")


def _take_input(folder: Path, name: str, record: UploadedFile) -> FileRecord:
    """Link an uploaded file into the run, after its size and sha256 were checked; return them."""
    target, source = folder / name, Path(record.source)
    part = target.with_name(f".{target.name}.part")
    if Path(name).is_absolute() or ".." in Path(name).parts or target == folder:
        raise UsageError(f"input {name!r} lies outside the run")
    if not source.is_file():
        raise UsageError(f"input {name}: {source} was not uploaded")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), part)
    except OSError:
        # Another file system, or one without hard links (some network disks).
        shutil.copyfile(source, part)
    # What lies in the run is checked: the upload may be replaced at any moment.
    size, sha256 = part.stat().st_size, sha256_of(part)
    if (size, sha256) != (record.size, record.sha256):
        part.unlink()
        raise UsageError(
            f"input {name}: expected {formats.size(record.size)} with sha256 "
            f"{record.sha256}, {source} has {formats.size(size)} with {sha256}; upload it again"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())  # a run survives a power loss together with its data
    if target.exists() and part.samefile(target):
        part.unlink()  # a rename between two names of one file does nothing
    else:
        part.replace(target)
    return FileRecord(size, sha256)


def _sweep(runs: Path) -> None:
    """Delete what a killed create or remove has left."""
    for path in runs.glob(".*.removed-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in runs.glob(".*.incoming-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
