"""Every Python that our sources, roles and image start is one that imports only our code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import traps
from overlay import overlaid
from tunesmith.core import isolated
from tunesmith.hosts import agent

pytestmark = pytest.mark.contract

# An interpreter and an option that makes it run something: only -I may come first. So may -S
# and the like after it.
_START = re.compile(
    r"""python[\w.]*(?:\s*\}\})?["']?\)?,?[ ]+["']?(?P<option>-[a-zA-Z]*)["']?(?=[ ,\]\n]|$)"""
)
# In a shell script: a program whose name is a variable.
_VARIABLE = re.compile(r'"\$\{?\w+\}?" (?P<option>-[cm]?)(?= )')
# Asks for a version, or is an option of another program that takes an interpreter.
_HARMLESS = {"-V", "-I"}
_TEXTS = (".sh", ".yml", ".yaml", ".j2", ".py")
_SHELLS = {"sh", "/bin/sh", "bash"}


def options(text: str) -> list[str]:
    """Return the options that interpreters are started with in a script, but the harmless ones."""
    found = [*_START.finditer(text), *_VARIABLE.finditer(text)]
    return [start[0] for start in found if start["option"] not in _HARMLESS]


def scripts(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield shell scripts, roles, playbooks and the Dockerfile, without their comments."""
    for folder in ("ansible", "docker", "src/tunesmith"):
        for file in sorted((root / folder).rglob("*")):
            kinds = (".sh", ".yml", ".yaml") if folder.startswith("src") else _TEXTS
            if file.suffix in kinds or file.name == "Dockerfile":
                lines = file.read_text(encoding="utf-8").splitlines()
                yield file, "\n".join(x for x in lines if not x.lstrip().startswith("#"))


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module but its docstrings, f-strings with their variables."""
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parser"):
            # What the program calls itself in its help.
            prose.update(ast.walk(node))  # type: ignore[arg-type]
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            yield "".join(_part(value) for value in node.values)
    for node in ast.walk(tree):
        known = node in prose or node in inside
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not known:
            yield node.value


def _part(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    return "python" if "python" in ast.unparse(value) else "X"


def words_of(tree: ast.AST) -> Iterator[list[object]]:
    """Yield the words of each list, tuple and call, None for what is no literal."""
    for node in ast.walk(tree):
        elements = getattr(node, "args", None) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.List | ast.Tuple):
            elements = node.elts
        if isinstance(elements, list):
            yield [e.value if isinstance(e, ast.Constant) else None for e in elements]


def test_the_search_finds_what_it_is_for() -> None:
    for line in (
        'exec "$environment/bin/python" -m tunesmith.job.supervisor.agent',
        "python3.10 -c 'import x'",
        'argv: ["{{ cuda_python }}", "-"]',
        '"$python" -m venv /uv',
        'ENTRYPOINT ["tini", "--", "python", "-m", "tunesmith.cli.container"]',
        '"$python" -S -I x.py',
        'limited 3 "$path" -c "import sys"',
        '"$2" - "$1" <<END',
    ):
        assert options(line), line
    for line in (
        'exec "$environment/bin/python" -I -m tunesmith.job.supervisor.agent',
        'argv: ["{{ cuda_python }}", -I, "-"]',
        'uv pip install --python "$python" --quiet',
        "bin/python -V",
    ):
        assert not options(line), line


def test_scripts_and_roles_start_python_isolated(root: Path) -> None:
    found = [(file.name, line) for file, text in scripts(root) for line in options(text)]
    assert found == []
    assert len(list(scripts(root))) > 30


def test_our_code_starts_python_by_one_function(root: Path) -> None:
    started = 0
    for file in sorted((root / "src/tunesmith").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        started += len(re.findall(r"\bisolated\.(?:argv|code)\(", text))
        assert [line for value in texts(tree) for line in options(value)] == [], file
        if file.name == "isolated.py":
            continue
        for words in words_of(tree):
            for before, word in zip([None, *words], words, strict=False):
                started_here = word == "-m" or (word == "-c" and before not in _SHELLS)
                assert not started_here, (
                    f"{file}: {words}: tunesmith.core.isolated makes such a command"
                )
    assert started >= 20


def test_no_model_folder_brings_code(root: Path) -> None:
    """Unless told, transformers asks on a terminal whether it may run a folder's own code."""
    loads = 0
    for file in (root / "src/tunesmith").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "from_pretrained" and ast.unparse(node.func.value) != "PeftModel":
                # None: `**options`, which the caller has made.
                told = {keyword.arg for keyword in node.keywords}
                assert told & {"trust_remote_code", None}, f"{file}:{node.lineno}"
                loads += 1
    assert loads >= 5


def modules(root: Path) -> list[str]:
    """Return our modules that are programs."""
    src = root / "src"
    return [
        ".".join(file.relative_to(src).with_suffix("").parts).removesuffix(".__main__")
        for file in sorted(src.rglob("*.py"))
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    ]


def test_each_program_of_ours_runs_in_a_folder_of_somebody_else(root: Path, tmp_path: Path) -> None:
    """By the control environment's Python: what it lacks (torch) ends some, and none is misled."""
    mark, folder = tmp_path / "mark", tmp_path / "run"
    traps.lay(folder, mark)
    variables = {**os.environ, "PYTHONPATH": f":{folder}", "PYTHONUSERBASE": str(folder)}
    programs = modules(root)
    assert len(programs) >= 20
    running = [
        subprocess.Popen(
            isolated.argv(sys.executable, name, str(folder), "--help"),
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in programs
    ]
    for name, process in zip(programs, running, strict=True):
        said, _ = process.communicate()
        assert traps.sprung(mark) == "", name
        assert "No module named 'tunesmith" not in said, said
        assert f"No module named {name}" not in said, said


def test_a_hosts_agent_takes_no_code_from_homes_and_runs(tmp_path: Path) -> None:
    """Our script as a login shell runs it: in the home folder, over the folder of runs."""
    mark, home = tmp_path / "mark", tmp_path / "home"
    base = home / "tunesmith"
    for folder in (home, base, base / "runs" / "r1"):
        traps.lay(folder, mark)
    for name, text in (("state.json", "{}"), ("env.sh", f"export PYTHONPATH=:{home}\n")):
        (base / name).write_text(text)
    environment = base / "envs" / "one"
    overlaid(Path(sys.executable), environment)
    (environment / ".tunesmith-environment.json").write_text("{}")
    done = subprocess.run(
        ["/bin/sh", "-c", agent.script(), "sh", "runs"],
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert traps.sprung(mark) == ""
    assert (done.returncode, done.stdout) == (0, '{"runs": []}\n'), done.stderr


def test_inv_calls_no_program_of_the_folder_it_is_given_in(root: Path, tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "run"
    traps.lay(folder, mark)
    # Invoke looks for a tasks.py where it is called: that is its way to find a clone.
    (folder / "tasks.py").unlink()
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import tasks; print(os.environ['PATH'])"
    )
    done = subprocess.run(
        isolated.code(sys.executable, code, str(root)),
        cwd=folder,
        env={**os.environ, "PATH": f":.:bin:{os.environ['PATH']}:"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(Path(one).is_absolute() for one in done.stdout.strip().split(os.pathsep))
    argv = [Path(sys.executable).with_name("inv"), "--search-root", str(root), "runs"]
    variables = {"PATH": f":.:{os.environ['PATH']}", "TUNESMITH_HOME": str(tmp_path / "home")}
    subprocess.run(argv, cwd=folder, env=os.environ | variables, capture_output=True, check=True)
    assert traps.sprung(mark) == ""
