"""The image's entry point: the verbs of a clone, inside the container.

They are the commands of the same table, on Python 3.10 with the lock alone. What is different
here is looked at before one begins: the container ends with its first process, so a signal asks
the run for a checkpoint instead of leaving it behind, and what a container may lack (a mount,
shared memory, a GPU) is said first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from invoke import Config, Executor, Exit, Program
from invoke.parser import Parser, ParserContext

from tunesmith import __version__
from tunesmith.cli import container_services, container_training, data, run, table
from tunesmith.cli.command import COMMAND, Session, command, exit_codes
from tunesmith.cli.container_checks import (
    SHM,
    check_shm,
    find_config,
    gpus,
    mount_fault,
    prepare,
    say_device,
)
from tunesmith.cli.invoke_patches import Step, write_page
from tunesmith.core import formats

_BINARY = "docker run ... IMAGE"
# Options of a clone that mean nothing in a container: it is the target, and stays until the end.
LEFT_OUT = ("on", "attach", "queue", "from-laptop")

# The options of one call, by parameter.
Options = dict[str, Any]
# Looks at a verb's options before it begins, and returns those it begins with.
Before = Callable[[Options], Options]

_HEAD = """\
tunesmith: fine-tune, merge, predict and serve in a container

  docker run --rm --gpus all -v "$PWD:/workspace" IMAGE VERB ...
"""
_TAIL = """\
LLaMA-Factory's own:
  eval, export, webchat, env
  llamafactory-cli COMMAND   any other, and its own webui and api

Runs that somebody else has planned:
  job run|stop RUN [PHASE ...]

Files are looked for in /workspace, then among the image's own (configs/, data/). Runs are
kept in /workspace/.tunesmith/runs. `docker stop -t 120` asks for a checkpoint. VERB --help
shows a verb's options and an example."""


@command(
    example="inv check configs/train/deepseek_r1_1_5b_lora_sft.yaml",
    help={
        "config": "LLaMA-Factory YAML to check, with its data; may be given as a bare word",
        "overrides": "key=value words, as LLaMA-Factory takes them",
    },
)
def check(session: Session, config: str = "", overrides: list[str] | None = None) -> None:
    """Show what this container has, and whether a config is good."""
    from tunesmith.cli.config_check import verdict
    from tunesmith.cli.console import say
    from tunesmith.plan import build, parser
    from tunesmith.plan.options import TrainOptions
    from tunesmith.targets import factory

    project = session.project
    environment = project.environment()
    room, fault = os.statvfs(SHM), mount_fault()
    say(f"user         {os.getuid()}:{os.getgid()}")
    say(f"flavour      {environment.flavour.name}, lock {environment.flavour.lock_sha256[:12]}")
    say(f"/workspace   {fault.message if fault else 'mounted, can be written'}")
    say(f"HF_HOME      {project.hf_home}")
    say(f"{SHM}     {formats.size(room.f_blocks * room.f_frsize)}")
    say(f"GPUs         {gpus() or 'none: the CPU does the work; `--gpus all` gives them'}")
    if config:
        chosen = TrainOptions(config=find_config(Path(config)), overrides=tuple(overrides or ()))
        plan = build.plan_training(project, factory.target_of(project, "local", say), chosen)
        check_shm(plan.config or {})
        for found in plan.request.data:
            say(f"data         {found.key}: {formats.count(found.rows or 0)} rows checked")
        say(f"parser       {verdict(project, parser.ask_planned(project, plan))}")
        say(f"config       {chosen.config}: good")
    if fault:
        raise fault


@command(example="inv version")
def version(session: Session) -> None:
    """Show what is installed."""
    from tunesmith.cli.console import say

    project = session.project
    flavour = project.environment().flavour
    say(f"tunesmith {__version__}")
    say(f"Python {'.'.join(map(str, sys.version_info[:3]))}")
    say(f"LLaMA-Factory {project.stack.llamafactory}")
    for line in (*flavour.requirements, *project.stack.requirements):
        name, same, pinned = line.partition("==")
        if same and not name.startswith("llamafactory"):
            say(f"{name} {pinned}")
    say(f"flavour {flavour.name} (CUDA {flavour.cuda}), lock {flavour.lock_sha256[:12]}")


STEPS: tuple[Step, ...] = (
    (
        "Train",
        (container_training.train, container_training.resume, run.runs, run.logs, run.report),
    ),
    ("Results", (run.merge, run.predict, run.chat)),
    ("Data", (data.check, data.preview)),
    (
        "Services",
        (container_services.webui, container_services.address, container_services.api),
    ),
    ("This container", (check, version)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code (1: failed, 2: misuse)."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else "help"
    os.environ.setdefault(COMMAND, _BINARY)
    if verb in ("help", "--help", "-h"):
        write_page(STEPS, _HEAD, _TAIL)
        return 0
    try:
        if verb in PASSED_ON:
            with exit_codes():
                return PASSED_ON[verb](words[1:]) or 0
        table.patch_invoke(STEPS)
        program().run(["tunesmith", *words])
    except Exit as end:
        sys.stderr.write(f"{end.message}\n")
        return int(end.code)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def program() -> Program:
    """Return Invoke's program of the image's verbs."""
    verbs = [verb for _, commands in STEPS for verb in commands]
    return _Program(
        version=__version__,
        namespace=table.namespace(verbs),
        name="tunesmith",
        binary=_BINARY,
        executor_class=_Executor,
    )


class _Program(Program):  # type: ignore[misc]
    """Verbs with the options that a container has."""

    def create_config(self) -> None:
        # No settings are read from the container's home or /etc.
        self.config = Config(lazy=True)

    def _make_parser(self) -> Parser:
        parser = super()._make_parser()
        for context in parser.contexts.values():
            for option in {*LEFT_OUT} & set(context.args):
                _remove(context, option)
        return parser


def _remove(context: ParserContext, option: str) -> None:
    del context.args[option]
    del context.flags[f"--{option}"]
    context.inverse_flags.pop(f"--no-{option}", None)


class _Executor(Executor):  # type: ignore[misc]
    """Runs each verb after what a container has to look at."""

    def execute(self, *contexts: ParserContext) -> Any:
        for context in contexts:
            options: Options = context.as_kwargs
            if (before := BEFORE.get(context.name)) is not None:
                with exit_codes():
                    options = before(options)
            super().execute((context.name, options))
        return {}


def _before_predict(options: Options) -> Options:
    prepare()
    say_device()
    return options | {"config": str(find_config(Path(options["config"])))}


def _before_writing(options: Options) -> Options:
    prepare()
    return options


BEFORE: Mapping[str, Before] = {
    "predict": _before_predict,
    "merge": _before_writing,
    "report": _before_writing,
    "data.check": _before_writing,
}


def _job(words: list[str]) -> int:
    from tunesmith.cli.container_runs import cause_of
    from tunesmith.job import __main__ as job
    from tunesmith.job.run.folder import RunFolder

    # The engine says a container's first words again when it starts it again.
    if words[:1] == ["run"] and len(words) > 1:
        again = cause_of(RunFolder(Path(words[1]).resolve()), "user") == "container"
        words += ["--cause", "container"] if again else []
    sys.argv = ["job", *words]
    return job.main()


def _webchat(words: list[str]) -> None:
    listen, port = container_services.listening("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "webui")
    container_services.say_reach("GRADIO_SERVER_NAME", listen, port)
    _pass_on("webchat")(words)


def _pass_on(*verb: str) -> Callable[[list[str]], None]:
    """Return a verb that becomes a command of LLaMA-Factory."""

    def become(words: list[str]) -> None:
        sys.stdout.flush()
        # Into a pipe, as `docker logs` reads it, lines would come when a page is full.
        os.environ["PYTHONUNBUFFERED"] = "1"
        os.execvp("llamafactory-cli", ["llamafactory-cli", *verb, *words])  # noqa: S606

    return become


# Verbs whose words are another program's own.
PASSED_ON: Mapping[str, Callable[[list[str]], int | None]] = {
    "job": _job,
    "llamafactory-cli": _pass_on(),
    "webchat": _webchat,
    **{name: _pass_on(name) for name in ("env", "eval", "export")},
}

if __name__ == "__main__":
    sys.exit(main())
