"""The agent: handles a client's requests about the runs of a host.

`python -m tunesmith.job.supervisor.agent --runs DIR VERB ...`:

create             create a run from a RunOrder on stdin
renew RUN          replace the request of an idle run by a RunOrder on stdin
start RUN [PHASE]  start its phases, detached; a queued run counts as started;
                   --cause gives the reason (CAUSES)
stop RUN           request a checkpoint and the end of the run
find [RUN]         the id of a run, by default the newest
show RUN           request, config and status
runs               all runs, oldest first
watch RUN          a line for each change, until the run has ended
manifest RUN       the files of a pull
remove RUN         delete an idle run
afterwards RUN     run a CommandOrder from stdin once, after a success
resume-all         start the runs that a restart of the host interrupted; --cause gives the
                   reason, by default autostart: requested when the host boots

Orders and answers are the types of job/run/replies.py: an answer is one line of JSON on stdout
(watch: many; manifest: lines {"hashing", "total"} before it). A refusal is a Refusal, with exit
code 2 (nothing was changed) or 1. Standard library and yaml only, so that an answer takes a tenth
of a second.
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

# Age in seconds of a folder left by a killed create: longer than the last step of any upload.
_STALE_SECONDS = 3600.0

T = TypeVar("T")


def create(runs: Path, order: RunOrder) -> RunNamed:
    """Create a run folder completely, or not at all.

    Inputs are hard links to the uploaded files (copies where links are impossible), so later
    uploads must replace those files, never write into them. Raises UsageError for an existing run
    or an input that differs from its record.
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
            # A rename over a non-empty folder fails, so one of two creates succeeds.
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
    """Return the request with the record of its inputs, under their final names."""
    request = decode(RunRequest, _moved(encode(order.request), final, now))
    recorded = inputs.recorded(request, _moved(order.config, final, now), taken).inputs
    moved = {
        name: decode(RunInputs, _moved(encode(part), now, final)) for name, part in recorded.items()
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
    """Replace run.json and the inputs of an idle run. Raises UsageError if it is active."""
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
    """Delete an idle run. Raises UsageError if it is active."""
    output = output_of(run)
    doomed = runs / f".{run.run_id}.removed-{os.getpid()}"
    freed = take_away(run, doomed)
    with locked(doomed):
        # Another remove may have deleted it meanwhile.
        if doomed.exists():
            shutil.rmtree(doomed)
        _sweep(runs)
    outside = not output.is_relative_to(run.path) and output.is_dir()
    return Removed(freed, str(output) if outside else None)


def afterwards(run: RunFolder, order: CommandOrder) -> CommandResult:
    """Run a command once after a run has succeeded. Raises UsageError if another run needs the
    host, the run has not succeeded, or its command has already run."""
    run.request()
    return CommandResult(*limits.once(run, list(order.command)))


def resume_all(runs: Path, cause: Cause = "autostart") -> Resumed:
    """Start every run that was interrupted: by power loss, restart or kill -9.

    Runs that were working come before queued ones, then the oldest first. A run that used a GPU is
    refused while there is none: a host started without one, to fetch results, lacks the memory
    for it too.
    """
    cut_off = []
    started: list[str] = []
    refused: dict[str, str] = {}
    for folder in folders(runs):
        run = RunFolder(folder)
        # None for a run that was created but never started.
        status = run.last_status()
        if status is None or not status.active or run.busy():
            continue
        try:
            created = run.request().created
        except TunesmithError:
            continue  # damaged: `runs` shows it
        if status.gpu and not gpu.ask():
            refused[run.run_id] = _no_gpu(run)
            continue
        cut_off.append((status.state == "queued", created, run))
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
    """Run the command line; return the exit code."""
    try:
        given = _parser().parse_args(argv)
        _serve(given)
    except BrokenPipeError:
        # The client is gone. Nothing more can be written, not even at the interpreter's exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TunesmithError as error:
        _answer(Refusal(error.message, error.detail, error.hint))
        return error.exit_code
    except OSError as error:
        return _refused(error, given.runs)
    except Exception as error:  # noqa: BLE001 - the client understands only JSON
        traceback.print_exc()
        _answer(Refusal(f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _refused(error: OSError, runs: Path) -> int:
    """Report an error of the system, in one line if the disk caused it."""
    if disk.refused(error):
        _answer(Refusal(disk.explain(error, runs).message))
    else:
        traceback.print_exc()
        _answer(Refusal(f"{type(error).__name__}: {error}"))
    return 1


def _serve(options: argparse.Namespace) -> None:
    runs: Path = options.runs.absolute()
    verb: str = options.verb
    if verb in ("create", "runs", "resume-all"):
        unbound: dict[str, Callable[[], object]] = {
            "create": lambda: create(runs, _stdin(RunOrder)),
            "runs": lambda: RunList(tuple(list_runs(runs))),
            "resume-all": lambda: resume_all(runs, options.cause),
        }
        _answer(unbound[verb]())
        return
    run = find(runs, options.run)
    if verb == "watch":
        if options.once:
            _answer(poll(run, options.events, options.log))
            return
        until = time.monotonic() + options.seconds
        for snapshot in watch(run, options.events, options.log):
            _answer(snapshot)
            if time.monotonic() > until:
                return
        return
    answers: dict[str, Callable[[], object]] = {
        "renew": lambda: renew(run, _stdin(RunOrder)),
        "start": lambda: _launched(launch.start, run, list(options.phases), options.cause),
        "stop": lambda: _launched(launch.stop, run),
        "find": lambda: RunNamed(run.run_id),
        "show": lambda: show(run),
        "manifest": lambda: _sealed_manifest(run, options.what.split(",")),
        "remove": lambda: remove(runs, run),
        "afterwards": lambda: afterwards(run, _stdin(CommandOrder)),
    }
    _answer(answers[verb]())


class _Parser(argparse.ArgumentParser):
    """Reports errors as JSON on stdout, which the client reads."""

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
            verb.add_argument(
                "--events", type=int, default=0, help="start at this byte of events.jsonl"
            )
            verb.add_argument(
                "--log", type=int, default=-1, help="start at this byte of train.log; -1: omit"
            )
            verb.add_argument("--once", action="store_true", help="print one line, then exit")
            verb.add_argument(
                "--seconds", type=float, default=math.inf, help="exit after this time"
            )
        elif name == "manifest":
            parts = ",".join(PARTS)
            verb.add_argument("--what", default=",".join(USUAL), help=f"any of {parts}")
    return parser


def _sealed_manifest(run: RunFolder, what: list[str]) -> Manifest:
    """Return the files of a pull, after comparing every result with its seal.

    An active run is not compared: a file may not have its seal yet.
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
    # UTF-8 whatever the host's locale; undecodable characters become JSON escapes.
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
    return UsageError(f"run {run_id} already exists", hint="`inv runs` lists it")


def _take_input(folder: Path, name: str, record: UploadedFile) -> FileRecord:
    """Link an uploaded file into the run, check its size and sha256, and return them."""
    target, source = folder / name, Path(record.source)
    part = target.with_name(f".{target.name}.part")
    if Path(name).is_absolute() or ".." in Path(name).parts or target == folder:
        raise UsageError(f"input {name!r} is outside the run")
    if not source.is_file():
        raise UsageError(f"input {name}: {source} was not uploaded")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), part)
    except OSError:
        # Another file system, or one without hard links (some network disks).
        shutil.copyfile(source, part)
    # Check the file in the run: the upload may be replaced at any moment.
    size, sha256 = part.stat().st_size, sha256_of(part)
    if (size, sha256) != (record.size, record.sha256):
        part.unlink()
        raise UsageError(
            f"input {name}: expected {formats.size(record.size)} with sha256 "
            f"{record.sha256}, {source} has {formats.size(size)} with {sha256}; upload it again"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())  # the data must survive a power loss like the run
    if target.exists() and part.samefile(target):
        part.unlink()  # renaming between two names of one file does nothing
    else:
        part.replace(target)
    return FileRecord(size, sha256)


def _sweep(runs: Path) -> None:
    """Delete the remains of a killed create or remove."""
    for path in runs.glob(".*.removed-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in runs.glob(".*.incoming-*"):
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
