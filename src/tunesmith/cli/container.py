"""The image's entry point: the verbs of a clone, inside the container.

Checks and plans are those of the laptop (plan/build.py, cli/run.py), on Python 3.10 with the lock
alone; a run is worked on by the same supervisor. What is different here: the container ends
with its first process, so a signal asks the run for a checkpoint instead of leaving it
behind, and what a container may lack (a mount, shared memory, a GPU) is said first.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tunesmith.core import formats
from tunesmith.core.errors import TunesmithError, UsageError

if TYPE_CHECKING:
    from tunesmith.job.run.folder import RunFolder
    from tunesmith.job.run.schema import Cause, RunRequest, RunStatus

# The image's own copy of the repository: sources, configs, demo data.
APP = Path(__file__).resolve().parents[3]
WORKSPACE = Path("/workspace")

# LLaMA-Factory's commands that have no verb of ours of the same name.
PASSED_ON = ("env", "eval", "export", "webchat")
# NCCL and data loaders pass batches through it; Docker gives 64 MB unless told.
SHM = "/dev/shm"  # noqa: S108 - looked at, not written to
SHM_BYTES = 1_000_000_000
_COMMAND = "docker run ... IMAGE"
_ADDRESS = "python -I -m tunesmith.cli.container address"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

HELP = """\
tunesmith: fine-tune, merge, predict and serve in a container

  docker run --rm --gpus all -v "$PWD:/workspace" IMAGE VERB ...

  train CONFIG [key=value ...]    train, measured before and after; continues a stopped run
  resume [--run RUN]              continue a stopped or failed run
  merge [--run RUN]               merge the adapter into the base model, and prove it
  predict CONFIG [--run RUN]      answer a data set, score the answers
  chat [--run RUN]                talk to a run's model (docker run -it)
  runs, logs, report              list runs, print a log, write the page
  webui                           LLaMA Board on port 7860, without a model's own code
  address                         (docker exec) the address of that Board, which works once
  api [--run RUN]                 a run's model as OpenAI-style API on port 8000, with a key
  check [CONFIG]                  what this container has, and whether a config is good
  version                         what is installed
  eval, export, webchat, env      LLaMA-Factory's own; any other, and its own webui and api:
                                  llamafactory-cli COMMAND
  job run|stop RUN [PHASE ...]    work on a run folder that somebody else has planned

Files are looked for in /workspace, then among the image's own (configs/, data/). Runs are
kept in /workspace/.tunesmith/runs. `docker stop -t 120` asks for a checkpoint. VERB --help
tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code (1: failed, 2: misuse)."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words.pop(0) if words else "help"
    from tunesmith.cli.console import COMMAND, as_typed

    os.environ.setdefault(COMMAND, _COMMAND)
    try:
        if verb in ("help", "--help", "-h"):
            sys.stdout.write(HELP + "\n")
            return 0
        if verb not in VERBS:
            known = ", ".join(VERBS)
            raise UsageError(f"there is no verb {verb!r}; known are {known} (`help` tells more)")
        return VERBS[verb](words) or 0
    except TunesmithError as error:
        sys.stderr.write(as_typed(error.render()) + "\n")
        return error.exit_code
    except OSError as error:
        from tunesmith.job.system import disk

        if not disk.refused(error):
            raise
        sys.stderr.write(as_typed(disk.explain(error, Path.cwd()).render()) + "\n")
        return 1


def missing(mounts: str, owner: tuple[int, int], writable: bool) -> str | None:
    """Return why /workspace cannot be worked in, or None.

    `mounts` is /proc/self/mountinfo, whose fifth field is a mount's place; `owner` is the
    uid and gid of /workspace.
    """
    places = [line.split()[4] for line in mounts.splitlines()]
    if str(WORKSPACE) not in places:
        return (
            f"nothing is mounted on {WORKSPACE}, and a run would be lost with the container; "
            'add `-v "$PWD:/workspace"` to docker run'
        )
    if not writable:
        return (
            f"{WORKSPACE} belongs to {owner[0]}:{owner[1]} and this container runs as "
            f"{os.getuid()}:{os.getgid()}; add `--user {owner[0]}:{owner[1]}` to docker run"
        )
    return None


def short_of_shm(config: Mapping[str, Any], size: int, gpus: int) -> str | None:
    """Return why a config cannot be trained with `size` bytes of /dev/shm, or None."""
    workers = int(config.get("dataloader_num_workers") or 0)
    if size >= SHM_BYTES or (workers == 0 and gpus < 2):
        return None
    who = f"dataloader_num_workers is {workers}" if workers else f"there are {gpus} GPUs"
    return (
        f"{SHM} has {formats.size(size)} and {who}, which pass data through it; add "
        "`--shm-size 8g` to docker run"
    )


def gpus() -> int:
    """Return how many GPUs the container was given."""
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return len(devices) or int(Path("/dev/dxg").exists())


def _mount_fault(*, writing: bool = True) -> str | None:
    status = WORKSPACE.stat()
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    may = not writing or os.access(WORKSPACE, os.W_OK)
    return missing(mounts, (status.st_uid, status.st_gid), may)


def _prepare() -> None:
    """Refuse a container that cannot do a run's work, and let a signal end it well."""
    if fault := _mount_fault():
        raise UsageError(fault)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    """Ask the run that is worked on here for a checkpoint; with none, end."""
    from tunesmith.job.run.folder import RunFolder
    from tunesmith.project import Project

    asked = False
    for file in Project.at(APP).runs.glob("*/status.json"):
        owner = RunFolder(file.parent).status().supervisor
        # A pid of another container may be in use here, too: alive() tells them apart.
        if owner and owner.alive():
            os.kill(owner.pid, signal.SIGTERM)
            asked = True
    if not asked:
        raise SystemExit(128 + number)


def _say_device() -> None:
    from tunesmith.cli.console import say

    if not gpus():
        say(
            "no GPU is seen here, so the CPU does it; with the NVIDIA container toolkit "
            "`--gpus all` gives one"
        )


def _find(config: Path) -> Path:
    """Return a config that is here: below /workspace, or the image's own."""
    from tunesmith.project import Project

    found = Project.at(APP).find(config)
    if not found.is_file():
        raise UsageError(
            f"{config}: not in the container, which sees what is mounted on {WORKSPACE}; give the "
            "path from there, as in configs/train/NAME.yaml"
        )
    return found


def _parser(verb: str, *, config: bool = False, run: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(verb)
    if config:
        parser.add_argument("config", type=Path, help="a LLaMA-Factory YAML")
        parser.add_argument("overrides", nargs="*", help="key=value, as LLaMA-Factory takes them")
        parser.add_argument("--mirror", default="default", help="default, cn, or a file (.yml)")
    if run:
        parser.add_argument("--run", help="run id (default: the newest)")
    return parser


def _train(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run
    from tunesmith.cli.console import say
    from tunesmith.job.run.folder import RunFolder
    from tunesmith.plan import build
    from tunesmith.project import Project

    parser = _parser("train", config=True, run=True)
    parser.add_argument("--prompts", type=Path, help="YAML with prompts for before and after")
    parser.add_argument("--revision", help="revision of the base model")
    parser.add_argument("--preset", help="fast or none (default: what the config's head says)")
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_false")
    parser.add_argument("--new", action="store_true", help="do not continue a stopped run")
    options = parser.parse_intermixed_args(words)
    _prepare()
    asked = build.Asked(
        _find(options.config),
        tuple(options.overrides),
        _find(options.prompts) if options.prompts else None,
        options.evaluate,
        options.run,
        options.revision,
        options.mirror,
        preset=options.preset,
    )
    _check_shm(asked.config, asked.overrides)
    _say_device()
    unfinished = None if options.new else _unfinished(asked)
    if unfinished:
        say(f"run {unfinished} of this config was not finished (--new would start another)")
        cause = _cause(RunFolder(Project.at(APP).run_folder(unfinished)), "resume")
        cli_run.resume(APP, "local", unfinished, cause=cause, dry=False)
        return
    cli_run.train(APP, "local", asked, cli_run.Choices())


def _unfinished(asked: Any) -> str | None:
    """Return the run that the words of `train` mean to go on with, or None.

    `docker run` and a container that its engine starts again say the same words each time.
    """
    from tunesmith.cli.console import say
    from tunesmith.plan import build
    from tunesmith.project import Project
    from tunesmith.targets import factory

    project = Project.at(APP)
    target = factory.target_of(project, "local", say)
    plan = build.plan_training(project, target, asked, None)
    wanted = identity(plan.request, plan.config or {})
    for run in reversed(target.runs()):
        run_id = run.run_id
        known = identity(target.request(run_id), target.config(run_id))
        if asked.run_id in (None, run_id) and known == wanted:
            # The newest of its kind decides: one that is through is not passed over.
            return run_id if may_continue(run) else None
    return None


def _cause(run: RunFolder, usual: Cause) -> Cause:
    """Return why work on a run begins here: what is usual, unless the engine has started again
    the very container that worked on it."""
    status = run.last_status()
    worked = status.supervisor if status else None
    return "container" if worked and worked.restarted() else usual


def identity(request: RunRequest, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two runs of the same words have in common: base model and config."""
    own = ("output_dir", "model_name_or_path")
    model = request.model.name if request.model else None
    return model, {key: value for key, value in config.items() if key not in own}


def may_continue(status: RunStatus) -> bool:
    """Whether a run was stopped or killed in its training.

    One that failed by itself would fail again: that is for `resume`, when it was mended.
    """
    ended = status.state == "stopped" or status.failure == "killed"
    return ended and status.phases.get("train") != "succeeded"


def _check_shm(config: Path, overrides: Sequence[str]) -> None:
    from tunesmith.plan import build
    from tunesmith.project import Project

    values = build.read_config(Project.at(APP), config, overrides).values
    room = os.statvfs(SHM)
    fault = short_of_shm(values, room.f_blocks * room.f_frsize, gpus())
    if fault:
        raise UsageError(fault)


def _resume(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run
    from tunesmith.job.run.listing import find
    from tunesmith.project import Project

    options = _parser("resume", run=True).parse_args(words)
    _prepare()
    _say_device()
    run = find(Project.at(APP).runs, options.run)
    cli_run.resume(APP, "local", run.run_id, cause=_cause(run, "resume"), dry=False)


def _merge(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run

    parser = _parser("merge", run=True)
    parser.add_argument("overrides", nargs="*", help="export keys, as in infer_dtype=float32")
    parser.add_argument(
        "--accept-mismatch", action="store_true", help="although prompts differ from the trained"
    )
    options = parser.parse_intermixed_args(words)
    _prepare()
    overrides, accept = tuple(options.overrides), options.accept_mismatch
    cli_run.merge(APP, "local", options.run, overrides, accept=accept, dry=False)


def _predict(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run

    options = _parser("predict", config=True, run=True).parse_intermixed_args(words)
    _prepare()
    _say_device()
    overrides = tuple(options.overrides)
    config = _find(options.config)
    cli_run.predict(APP, "local", config, options.run, overrides, mirror=options.mirror, dry=False)


def _chat(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run

    parser = _parser("chat", run=True)
    parser.add_argument("--what", choices=("base", "adapter", "merged"), default="adapter")
    parser.add_argument("--prompt", default="", help="answer this one prompt and end")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, default=0)
    options = parser.parse_args(words)
    cli_run.chat(
        APP,
        "local",
        options.run,
        what=options.what,
        prompt=options.prompt,
        system=options.system,
        greedy=options.greedy,
        max_new_tokens=options.max_new_tokens,
        dry=False,
    )


def _runs(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run

    parser = _parser("runs")
    parser.add_argument("--json", action="store_true")
    cli_run.list_runs(APP, "local", as_json=parser.parse_args(words).json)


def _logs(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run

    parser = _parser("logs", run=True)
    parser.add_argument("--follow", action="store_true")
    options = parser.parse_args(words)
    cli_run.logs(APP, "local", options.run, follow=options.follow)


def _report(words: list[str]) -> None:
    from tunesmith.cli import run as cli_run

    parser = _parser("report", run=True)
    parser.add_argument("--language", choices=("en", "zh"), default="en")
    options = parser.parse_args(words)
    _prepare()
    cli_run.report(APP, "local", options.run, language=options.language)


def _check(words: list[str]) -> int:
    """Say what the container has; with a config, whether it and its data are good."""
    from tunesmith.cli.console import say
    from tunesmith.plan import build
    from tunesmith.project import Project
    from tunesmith.targets import factory

    parser = _parser("check")
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(words)
    project = Project.at(APP)
    environment = project.environment()
    room, fault = os.statvfs(SHM), _mount_fault()
    say(f"user         {os.getuid()}:{os.getgid()}")
    say(f"flavour      {environment.flavour.name}, lock {environment.flavour.lock_sha256[:12]}")
    say(f"/workspace   {fault or 'mounted, can be written'}")
    say(f"HF_HOME      {project.hf_home}")
    say(f"{SHM}     {formats.size(room.f_blocks * room.f_frsize)}")
    say(f"GPUs         {gpus() or 'none: the CPU does the work; `--gpus all` gives them'}")
    if options.config:
        asked = build.Asked(_find(options.config), tuple(options.overrides))
        _check_shm(asked.config, asked.overrides)
        target = factory.target_of(project, "local", say)
        for found in build.plan_training(project, target, asked, None).request.data:
            say(f"data         {found.key}: {found.rows} rows checked")
        say(f"config       {asked.config}: good")
    if fault:
        raise UsageError(fault)
    return 0


def _version(words: list[str]) -> None:
    _parser("version").parse_args(words)
    from tunesmith import __version__
    from tunesmith.cli.console import say
    from tunesmith.project import Project

    project = Project.at(APP)
    flavour = project.environment().flavour
    say(f"tunesmith {__version__}")
    say(f"Python {'.'.join(map(str, sys.version_info[:3]))}")
    say(f"LLaMA-Factory {project.stack.llamafactory}")
    for line in (*flavour.requirements, *project.stack.requirements):
        name, same, version = line.partition("==")
        if same and not name.startswith("llamafactory"):
            say(f"{name} {version}")
    say(f"flavour {flavour.name} (CUDA {flavour.cuda}), lock {flavour.lock_sha256[:12]}")


def _job(words: list[str]) -> int:
    from tunesmith.job import __main__ as job
    from tunesmith.job.run.folder import RunFolder

    # The engine says a container's first words again when it starts it again.
    if words[:1] == ["run"] and len(words) > 1:
        again = _cause(RunFolder(Path(words[1]).resolve()), "user") == "container"
        words += ["--cause", "container"] if again else []
    sys.argv = ["job", *words]
    return job.main()


def _webui(words: list[str]) -> None:
    """Be the Board of a host, with its guards, over what is mounted."""
    from tunesmith.cli.console import say
    from tunesmith.project import Project

    parser = _parser("webui")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="at first")
    options = parser.parse_args(words)
    if fault := _mount_fault():
        raise UsageError(fault)
    listen, port = _listening("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "webui")
    data = str(Project.at(APP).find("data"))
    _tell_way("GRADIO_SERVER_NAME", listen, port)
    settings = {"data": data, "language": options.language}
    # Not told here: Docker keeps what a container says.
    named = os.environ.get("HOSTNAME", "")
    container = named if re.fullmatch(r"[0-9a-f]{12}", named) else "CONTAINER"
    how = f"`docker exec {container} {_ADDRESS}` tells an address that works once"
    say(f"LLaMA Board on port {port}: {how}")
    _serve("webui", settings, listen, port, key=secrets.token_urlsafe(32), hint=how)


def _address(words: list[str]) -> None:
    """Tell the address of the Board that runs in this container, with a token of its own."""
    from tunesmith.cli.console import say
    from tunesmith.job.services import access, manager

    _parser("address").parse_args(words)
    found = manager.served_here("webui")
    if found is None:
        raise UsageError(
            "LLaMA Board does not run in this container; `docker run ... IMAGE webui` starts one, "
            f"and `docker exec CONTAINER {_ADDRESS}` asks that one"
        )
    token = secrets.token_urlsafe(32)
    access.admit(found.tokens, token)
    port = (found.record() or {})["port"]
    say(f"http://127.0.0.1:{port}/?token={token}")


def _api(words: list[str]) -> None:
    """Be the API of a host: a run's model, for who has the key."""
    from tunesmith.cli.console import say
    from tunesmith.job.run.listing import find
    from tunesmith.project import Project

    parser = _parser("api", run=True)
    parser.add_argument("--what", choices=("adapter", "merged", "base"), default="adapter")
    parser.add_argument("config", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    key = _given_key()
    listen, port = _listening("API_HOST", "API_PORT", "api")
    if not key:
        # One made here would be told in the container's log, which Docker keeps.
        raise UsageError(
            f"api on {listen} without an API_KEY would serve anybody who reaches it; `export "
            "API_KEY=...` with a secret of your own, and add `-e API_KEY` to docker run (or "
            "name a file of it by API_KEY_FILE)"
        )
    if options.config:
        raise UsageError(
            f"api {options.config}: it serves a run (`--run RUN`, by default the newest); for a "
            f"config there is LLaMA-Factory's own, `{_COMMAND} llamafactory-cli api "
            f"{options.config}`"
        )
    if fault := _mount_fault(writing=False):
        raise UsageError(fault)
    # An empty --run is what docker/compose.yaml says for the newest.
    run = find(Project.at(APP).runs, options.run or None)
    say(f"model {run.run_id} ({options.what})")
    _tell_way("API_HOST", listen, port)
    _serve("api", {}, listen, port, serves={"what": options.what}, run=run.run_id, key=key)


def _given_key() -> str:
    """Return the key that the user gave by API_KEY or in the file of API_KEY_FILE; "": none.

    Raises UsageError for a file that cannot be read.
    """
    # Not for the processes below: they have no need of it.
    key, named = os.environ.pop("API_KEY", ""), os.environ.get("API_KEY_FILE")
    if key or not named:
        return key
    try:
        return Path(named).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"API_KEY_FILE={named}: {error}; mount it: `-v KEYFILE:{named}:ro`"
        ) from None


def _listening(key: str, port_key: str, service: str) -> tuple[str, int]:
    """Return the address and port that the variables ask for, else those of the service."""
    from tunesmith.job.services.manager import LOOPBACK, PORTS

    listen = os.environ.get(key) or LOOPBACK
    given = os.environ.get(port_key) or str(PORTS[service])
    if not (given.isascii() and given.isdecimal() and 0 < int(given) < 65536):
        raise UsageError(f"{port_key}={given}: a number from 1 to 65535 is expected")
    return listen, int(given)


def _tell_way(key: str, listen: str, port: int) -> None:
    """Say how a server is reached that only its own container can reach."""
    from tunesmith.cli.console import say

    if listen in _LOOPBACK:
        say(
            f"listening on the container's own 127.0.0.1:{port}; to reach it from this "
            f"machine add `-e {key}=0.0.0.0 -p 127.0.0.1:{port}:{port}`"
        )


def _serve(name: str, settings: Mapping[str, str], listen: str, port: int, **more: Any) -> None:
    from tunesmith.job.services import access, manager
    from tunesmith.project import Project

    project = Project.at(APP)
    folders = {"models": str(project.models), "runs": str(project.runs)}
    # Into a pipe, as `docker logs` reads it, lines would come when a page is full.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # A name under which somebody publishes it; 127.0.0.1 and localhost are always taken.
    try:
        allowed = access.parse_names(os.environ.get(access.ALLOWED, ""))
    except UsageError as error:
        raise UsageError(f"{access.ALLOWED}: {error.message}", hint=error.hint) from None
    asked = {"serves": {}, "settings": folders | dict(settings), "allowed": allowed, **more}
    manager.serve_here(name, asked, base=project.home, listen=listen, port=port)


def _webchat(words: list[str]) -> None:
    listen, port = _listening("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "webui")
    _tell_way("GRADIO_SERVER_NAME", listen, port)
    _pass_on("webchat")(words)


def _pass_on(*command: str) -> Callable[[list[str]], None]:
    """Return a verb that becomes a command of LLaMA-Factory."""

    def become(words: list[str]) -> None:
        sys.stdout.flush()
        # Into a pipe, as `docker logs` reads it, lines would come when a page is full.
        os.environ["PYTHONUNBUFFERED"] = "1"
        os.execvp("llamafactory-cli", ["llamafactory-cli", *command, *words])  # noqa: S606

    return become


VERBS: Mapping[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "resume": _resume,
    "merge": _merge,
    "predict": _predict,
    "chat": _chat,
    "runs": _runs,
    "logs": _logs,
    "report": _report,
    "webui": _webui,
    "address": _address,
    "api": _api,
    "check": _check,
    "version": _version,
    "job": _job,
    "llamafactory-cli": _pass_on(),
    "webchat": _webchat,
    **{name: _pass_on(name) for name in PASSED_ON if name != "webchat"},
}

if __name__ == "__main__":
    sys.exit(main())
