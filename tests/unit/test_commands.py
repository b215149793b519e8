"""The command table: each verb's declaration, and what a shell completes of it."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import Program
from invoke.parser import Parser, ParserContext

from tunesmith.cli import container, run, table
from tunesmith.cli.command import Command
from tunesmith.cli.completion import candidates
from tunesmith.job.export.export import FORMATS

pytestmark = pytest.mark.unit

BY_NAME = {command.name: command for command in table.COMMANDS}
OF_IMAGE = [verb for _, verbs in container.STEPS for verb in verbs]


def parser() -> Parser:
    table.patch_invoke()
    initial = ParserContext(args=Program().core_args())
    return Parser(initial=initial, contexts=table.namespace().to_contexts())


def complete(*words: str) -> list[str]:
    contexts = parser().contexts
    return candidates(words, contexts, Program().initial_context, table.namespace())


@pytest.mark.parametrize("command", table.COMMANDS, ids=lambda command: command.name)
def test_every_example_is_a_command_line_of_its_verb(command: Command) -> None:
    words = shlex.split(command.example)
    assert words.pop(0) == "inv"
    core, *given = parser().parse_argv(words)
    assert [task.name for task in given] == [command.name]
    for option, allowed in command.choices.items():
        assert given[0].args[option].value in ("", *allowed), option
    assert core.args.dry.value == ("--dry" in words)


@pytest.mark.parametrize("command", [*table.COMMANDS, *OF_IMAGE], ids=lambda command: command.name)
def test_every_option_has_a_text_and_every_verb_a_sentence(command: Command) -> None:
    _session, *options = inspect.signature(command.function).parameters
    names = [name.rstrip("_").replace("_", "-") for name in options]
    assert sorted(command.texts) == sorted(names)
    assert all(command.texts.values())
    sentence = str(inspect.getdoc(command.function)).splitlines()[0]
    assert sentence.endswith("."), sentence
    assert set(command.choices) <= set(names)


def test_the_formats_of_an_export_are_those_it_makes() -> None:
    assert tuple(run.export.choices["format"]) == tuple(FORMATS)


def test_names_are_declared_once() -> None:
    names = [command.name for command in table.COMMANDS]
    assert len(names) == len(set(names)) > 40


def test_tasks_py_only_collects(root: Path) -> None:
    lines = (root / "tasks.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert not [line for line in lines if line.startswith(("def ", "@", "class "))]


def test_the_examples_of_the_image_are_command_lines_there() -> None:
    program = container.program()
    table.patch_invoke()
    program.argv = ["tunesmith"]
    program.create_config()
    program.parse_core(["tunesmith"])
    program.parse_collection()
    from tunesmith.cli.invoke_patches import example

    for verb in OF_IMAGE:
        contexts = program._make_parser()
        line = example(verb, contexts.contexts[verb.name])
        given = contexts.parse_argv(shlex.split(line)[1:])
        assert [task.name for task in given[1:]] == [verb.name], line


def test_verbs_and_options_are_completed() -> None:
    assert {"train", "host.add", "data.check"} <= set(complete())
    assert {"train", "host.add"} <= set(complete("tra"))
    assert {"--config", "--on", "--no-attach"} <= set(complete("train", "--"))
    assert {"--config", "--on"} <= set(complete("train", "--co"))
    assert {"--config", "stop"} <= set(complete("train", "--evaluate"))
    assert "--dry" in complete("--")


def test_values_are_completed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUNESMITH_INVENTORY", str(tmp_path / "inventory"))
    run = tmp_path / "home/runs/20260114-093005-x"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"run_id": run.name}))
    (run.parent / "left-over").mkdir()
    inventory = tmp_path / "inventory"
    inventory.mkdir()
    (inventory / "hosts.yml").write_text("gpu_hosts: {hosts: {gpu1: {}, own: {}}}\n")
    (inventory / "ssh_config").write_text("Host gpu1\n  HostName gpu1.invalid\n")

    assert complete("train", "--on") == ["local", "container", "gpu1"]
    assert complete("train", "--on", "gp") == ["local", "container", "gpu1"]
    assert complete("webui", "--on") == ["local", "gpu1"]
    assert complete("provision") == complete("host.remove") == ["gpu1"]
    assert complete("host.check", "--on") == ["gpu1"]
    for words in (("attach", "--run"), ("logs", "--run", "2026"), ("rm",)):
        assert complete(*words) == [run.name], words
    trained = [str(file.relative_to(root)) for file in root.glob("configs/train/**/*.yaml")]
    assert complete("train", "--config") == sorted(trained)
    predicted = [str(file.relative_to(root)) for file in root.glob("configs/predict/**/*.yaml")]
    assert complete("predict", "--config") == sorted(predicted)
    assert complete("train", "--mirror", "c") == ["cn", "default"]
    assert complete("stack.install", "--flavour") == ["cu126", "cu128"]
    assert complete("chat", "--what") == ["base", "adapter", "merged"]
    assert "RTX4090" in complete("data.check", "--gpu")
    # A value in full is followed by what may come next.
    assert {"--run", "stop"} <= set(complete("attach", "--on", "gpu1"))
    # What nobody can know is left to the shell, which completes files.
    assert complete("data.check", "--file") == []


@pytest.mark.parametrize(
    ("words", "some"), [("inv train --on", "container"), ("inv train --confg", "--config")]
)
def test_a_shell_gets_candidates_and_nothing_else(
    root: Path, tmp_path: Path, words: str, some: str
) -> None:
    inv = Path(sys.executable).with_name("inv")
    inventory = tmp_path / "inventory"
    inventory.mkdir()
    for text in ("", "all: [\n"):  # also of an inventory that cannot be read
        (inventory / "hosts.yml").write_text(text)
        done = subprocess.run(
            [inv, "--complete", "--", *words.split()],
            cwd=root,
            env=os.environ | {"TUNESMITH_INVENTORY": str(inventory)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert some in done.stdout.split() or text
    assert list(inventory.iterdir()) == [inventory / "hosts.yml"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str, root: Path) -> None:
    inv = Path(sys.executable).with_name("inv")
    argv = [inv, "--print-completion-script", shell]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=True)
    assert "--complete -- " in done.stdout


@pytest.mark.parametrize("words", [("pull", "--help"), ("--help", "pull"), ("pull", "-h")])
def test_a_commands_help_ends_with_its_example(root: Path, words: tuple[str, ...]) -> None:
    """Also of a command with a positional argument, whose value --help is not."""
    inv = Path(sys.executable).with_name("inv")
    done = subprocess.run([inv, *words], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("Example:\n  inv pull --on gpu1 --merge-here\n\n")


def test_inv_alone_is_a_first_page(root: Path) -> None:
    inv = Path(sys.executable).with_name("inv")
    done = subprocess.run([inv], cwd=root, capture_output=True, text=True, check=True)
    page = done.stdout
    assert all(f"\n  {name} " in page for name in BY_NAME)
    assert page.index("inv demo") < page.index("inv provision") < page.index("Train:")
    assert max(map(len, page.splitlines())) <= 95
