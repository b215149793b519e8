"""What the house promises: directions of imports, pairs of configs, doors that open fast."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from invoke import Program
from invoke.parser import Parser, ParserContext

from tunesmith.cli import container
from tunesmith.plan.config import load_config
from tunesmith.project import Project

pytestmark = pytest.mark.contract

# A line of a page's code block or of a config's head that starts with inv.
COMMAND = re.compile(r"^(?:#\s*(?:Run|Override):\s+)?(?:\.venv/bin/)?inv (.+)$")
# A command inside a message, as far as its line goes.
MENTION = re.compile(r"\binv ([a-z]+(?:\.[a-z]+)?)\b([^`;]*)")


# Who may import whom: a room only from rooms on the lines above its own, so there is no circle.
ROOMS = (
    {"core"},
    {"basemodel", "dataset"},
    {"job"},
    {"stack", "report"},
    {"project"},
    {"plan", "hosts"},
    {"doctor", "image", "services", "maintain"},
    {"targets", "provision"},
    {"cli"},
)
# The same within job/, which imports nothing else but what both halves may.
JOB_ROOMS = (
    {"system", "patches"},
    {"run"},
    {"inference"},
    {"prompts", "data"},
    {"merge", "evaluation", "supervisor"},
    {"training", "proof", "services"},
    {"export"},
    {"__main__"},
)
SHARED = {"core", "basemodel"}
# Copied to a host and run there by its path, before there is anything of ours: they import none.
ALONE = ("stack/bytecode.py", "stack/wheel_download.py")


def imports_of(file: Path) -> set[str]:
    """Return the tunesmith modules a file imports, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A module of a package, or a name of a module: either way its room is among these.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("tunesmith.")}


def room(module: str, top: str = "tunesmith") -> str:
    """Return the room below `top` that a dotted name lies in."""
    return module.removeprefix(f"{top}.").split(".")[0]


def upward(folder: Path, top: str, floors: tuple[set[str], ...]) -> list[str]:
    """Return the imports below a folder that do not lead to a lower floor or stay in the room."""
    height = {name: floor for floor, names in enumerate(floors) for name in names}
    found = []
    for file in sorted(folder.rglob("*.py")):
        own = file.relative_to(folder).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module in imports_of(file):
            there = room(module, top)
            if module.startswith(f"{top}.") and there in height and there != own:
                found += [f"{file} imports {module}"] if height[there] >= height[own] else []
    return found


def test_every_room_has_its_place_and_says_what_belongs_in_it(root: Path) -> None:
    for folder, floors, beside in (
        (root / "src/tunesmith", ROOMS, {"__init__.py", "project.py"}),
        (root / "src/tunesmith/job", JOB_ROOMS, {"__init__.py", "__main__.py"}),
    ):
        rooms = {file.parent for file in folder.glob("*/__init__.py")}
        places = [name for floor in floors for name in floor]
        assert len(places) == len(set(places))
        modules = {file.name for file in folder.glob("*.py")}
        assert modules == beside
        alone = {Path(name).stem for name in modules - {"__init__.py"}}
        assert {path.name for path in rooms} | alone == set(places)
        for path in rooms:
            assert ast.get_docstring(ast.parse((path / "__init__.py").read_text("utf-8"))), path


def test_nothing_imports_upward(root: Path) -> None:
    assert upward(root / "src/tunesmith", "tunesmith", ROOMS) == []
    assert upward(root / "src/tunesmith/job", "tunesmith.job", JOB_ROOMS) == []


def test_job_half_imports_nothing_of_the_control_half(root: Path) -> None:
    for half in ("job", *SHARED):
        for file in (root / "src/tunesmith" / half).rglob("*.py"):
            allowed = {"job", "__version__", *SHARED} if half == "job" else SHARED
            control = {name for name in imports_of(file) if room(name) not in allowed}
            assert not control, f"{file} imports {control}"


def test_what_runs_by_its_path_imports_nothing_of_ours(root: Path) -> None:
    for name in ALONE:
        assert imports_of(root / "src/tunesmith" / name) == set()


def test_every_train_config_is_good_and_has_its_pair(project: Project) -> None:
    configs = project.root / "configs"
    files = sorted((configs / "train").rglob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        train = load_config(file, (), project.stack.schema)
        for kind in ("merge", "predict"):
            pair = load_config(configs / kind / file.name, (), project.stack.schema)
            assert pair.get("adapter_name_or_path") == train.get("output_dir"), (kind, file)
            assert pair.get("model_name_or_path") == train.get("model_name_or_path"), (kind, file)
            assert pair.get("template") == train.get("template"), (kind, file)
            assert pair.get("enable_thinking") == train.get("enable_thinking"), (kind, file)
    assert {f.name for f in (configs / "merge").iterdir()} == {f.name for f in files}
    assert {f.name for f in (configs / "predict").iterdir()} == {f.name for f in files}


def test_the_users_case_names_every_parameter_with_a_word(project: Project) -> None:
    file = project.root / "configs/train/deepseek_r1_1_5b_lora_sft.yaml"
    text = file.read_text(encoding="utf-8")
    for key in (
        "learning_rate",
        "num_train_epochs",
        "max_grad_norm",
        "max_samples",
        "bf16",
        "cutoff_len",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "val_size",
        "lr_scheduler_type",
    ):
        line = next(x for x in text.splitlines() if x.startswith(f"{key}:"))
        assert "#" in line, f"{key} has no comment"


def test_list_is_quick_and_loads_nothing_heavy(root: Path) -> None:
    code = (
        "import sys, tasks; heavy = {'torch', 'rich', 'huggingface_hub', 'matplotlib', "
        "'jsonschema', 'jinja2'} & set(sys.modules); print(heavy or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done


def test_every_task_is_in_the_list_with_a_line_that_fits(root: Path) -> None:
    inv = Path(sys.executable).with_name("inv")
    done = subprocess.run([inv, "--list"], cwd=root, capture_output=True, text=True, check=True)
    for name in ("train", "merge", "predict", "chat", "report", "runs", "logs", "stop", "resume"):
        assert f"  {name} " in done.stdout
    for name in ("data.check", "data.register", "model.fetch", "stack.show", "stack.lock"):
        assert f"  {name} " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_bare_words_reach_a_task_through_the_real_command(root: Path) -> None:
    inv = Path(sys.executable).with_name("inv")
    argv = [inv, "--dry", "train", "learning_rate=3e-4", "--no-evaluate", "num_train_epochs=2"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "  learning_rate: 0.0003" in done.stdout
    assert "  num_train_epochs: 2" in done.stdout


def commands(root: Path) -> list[tuple[str, str]]:
    """Return (place, command) of each `inv ...` line that our pages and configs tell to type."""
    found = []
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("data/*.md")]
    for file in [*pages, *root.glob("configs/**/*.y*ml")]:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for number, line in enumerate(text.splitlines(), 1):
            told = COMMAND.match(line)
            if told:
                found.append((f"{file.name}:{number}", told[1].partition("  ")[0]))
    return found


def test_every_command_we_tell_people_to_type_is_one(root: Path) -> None:
    import tasks

    contexts = tasks.ns.to_contexts()
    core = Program().core_args()
    told = commands(root)
    assert len(told) >= 15
    for place, command in told:
        words = shlex.split(command)
        parsed = Parser(initial=ParserContext(args=core), contexts=contexts).parse_argv(words)
        assert len(parsed) >= 2 or {"--list", "--help"} & {*words}, f"{place}: {command}"


def test_every_command_in_a_message_is_one(root: Path) -> None:
    """Errors name the command that mends them: task and flags must exist."""
    import tasks

    of_clone = {context.name: set(context.flags) for context in tasks.ns.to_contexts()}
    verbs = container.program().namespace.to_contexts()
    of_image = {context.name: set(context.flags) for context in verbs}
    seen = 0
    for file in [*root.glob("src/tunesmith/**/*.py"), *root.glob("src/tunesmith/**/*.j2")]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            flags = of_image if file.stem.startswith("container_") else of_clone
            if file == root / "src/tunesmith/cli/container.py":
                flags = of_clone | of_image
            for name, rest in MENTION.findall(line):
                told = set(re.findall(r"--[a-z][a-z-]*", rest))
                assert name in flags, f"{file.name}:{number}: there is no task {name}"
                assert told <= flags[name], f"{file.name}:{number}: {name} has no {told}"
                seen += 1
    assert seen >= 30


def test_a_wrong_word_is_refused_with_exit_code_2(root: Path) -> None:
    inv = Path(sys.executable).with_name("inv")
    argv = [inv, "--dry", "train", "learning_rat=3e-4"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean `learning_rate`?" in done.stderr


def test_no_version_of_the_stack_is_written_twice(project: Project) -> None:
    """Pins live in stack.yml (and the locks made of it); code and tools have none."""
    places = [
        # A patch says what it was tried with, which a new pin does not change.
        *(f for f in project.root.glob("src/**/*.py") if f.parent.name != "patches"),
        project.root / "Makefile",
        project.root / "tasks.py",
    ]
    for file in places:
        text = file.read_text(encoding="utf-8")
        for pin in ("torch==", "transformers==", "llamafactory==", "peft=="):
            assert pin not in text or f'"{pin}"' in text, f"{file} has {pin}"


def test_schema_is_json_and_knows_the_templates(project: Project) -> None:
    schema = json.loads(project.stack.schema.read_text(encoding="utf-8"))
    templates = schema["properties"]["template"]["anyOf"][0]["enum"]
    assert {"deepseekr1", "smollm", "qwen"} <= set(templates)


def test_all_yaml_of_ours_is_read_by_the_safe_loader(root: Path) -> None:
    for file in [*root.glob("configs/**/*.y*ml"), *root.glob("*.y*ml")]:
        yaml.safe_load(file.read_text(encoding="utf-8"))


def test_job_half_imports_on_its_own_python(root: Path, training_python: Path) -> None:
    """With only the lock (PYTHONPATH for our own code), light, and on Python 3.10."""
    code = (
        "import sys, tunesmith.job.supervisor.supervisor, tunesmith.basemodel.fetch; "
        "assert sys.version_info[:2] == (3, 10), sys.version; "
        "print({'torch', 'transformers', 'llamafactory'} & set(sys.modules) or 'light')"
    )
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        [training_python, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "light"), done
