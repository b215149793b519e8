"""The command table: every verb of a clone, by the steps of the work."""

from __future__ import annotations

from collections.abc import Iterable

from invoke import Collection

from tunesmith.cli import data, demo, host, image, model, run, service, stack
from tunesmith.cli.command import Command
from tunesmith.cli.completion import COMPLETE
from tunesmith.cli.invoke_patches import (
    BARE_WORDS,
    FIRST_PAGE,
    LIST,
    MISUSE_IS_TWO,
    TASK_HELP,
    Step,
)
from tunesmith.core.patching import install

STEPS: tuple[Step, ...] = (
    ("Try it", (demo.demo,)),
    (
        "A machine",
        (
            *(host.add, host.check, host.list_, host.trust, host.remove),
            *(host.provision, host.verify, host.autostart, host.reset),
        ),
    ),
    (
        "Data and base models",
        (
            *(data.check, data.convert, data.preview, data.register, data.split),
            *(model.list_, model.fetch),
        ),
    ),
    (
        "Train",
        (run.check, run.train, run.attach, run.runs, run.logs, run.stop, run.resume),
    ),
    (
        "Results",
        (run.report, run.pull, run.merge, run.predict, run.chat, run.export, run.remove),
    ),
    ("Services", (service.webui, service.api, service.tensorboard, service.tunnel)),
    (
        "The image",
        (
            *(image.build, image.verify, image.ship, image.push),
            *(image.tags, image.sizes, image.sbom, image.prune),
        ),
    ),
    (
        "This clone",
        (stack.install, stack.show, stack.check, stack.render, stack.lock),
    ),
)
COMMANDS: tuple[Command, ...] = tuple(command for _, commands in STEPS for command in commands)
PATCHES = (BARE_WORDS, MISUSE_IS_TWO, TASK_HELP, COMPLETE)
PAGES = (LIST, FIRST_PAGE)


def namespace(commands: Iterable[Command] = COMMANDS) -> Collection:
    """Return the commands as Invoke wants them: `noun.verb` in a collection of its noun."""
    top = Collection()
    nouns: dict[str, Collection] = {}
    for command in commands:
        noun, _, verb = command.name.rpartition(".")
        if noun:
            nouns.setdefault(noun, Collection(noun)).add_task(command, name=verb)
        else:
            top.add_task(command)
    for collection in nouns.values():
        top.add_collection(collection)
    return top


def patch_invoke(steps: tuple[Step, ...] = STEPS) -> None:
    """Teach this process's Invoke what it lacks for us."""
    for patch in PATCHES:
        install(patch)
    for page in PAGES:
        install(page, steps)
