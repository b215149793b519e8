"""What goes to a host, and is compared with it, is all that runs there and nothing else."""

from __future__ import annotations

import ast
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.stack import sources

pytestmark = pytest.mark.contract

PACKAGE = "src/tunesmith"
SENT = ("basemodel", "core", "job")


def shipped(root: Path) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(sources.app_tar(root))) as archive:
        return set(archive.getnames())


def modules(name: str, root: Path) -> Iterator[str]:
    """Yield the files that importing a dotted name of ours reads."""
    parts = name.split(".")[1:]
    for n in range(len(parts) + 1):
        path = Path(PACKAGE, *parts[:n])
        files = (path / "__init__.py", path.with_suffix(".py"))
        yield from (str(file) for file in files if (root / file).is_file())


def imported(file: Path) -> set[str]:
    """Return the dotted names of ours that a file imports, or names in a text to be started."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if node.value.replace(".", "").isidentifier() else set()
    return {name for name in found if name == "tunesmith" or name.startswith("tunesmith.")}


def closure(root: Path) -> set[str]:
    """Return the files of ours that the job half may read as code."""
    waiting = [str(file.relative_to(root)) for file in (root / PACKAGE / "job").rglob("*.py")]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [f for module in imported(root / name) for f in modules(module, root)]
    return seen


def test_all_that_the_job_half_imports_is_sent(root: Path) -> None:
    needed = closure(root)
    assert f"{PACKAGE}/core/files.py" in needed
    assert f"{PACKAGE}/basemodel/hub_client.py" in needed, "started by its name"
    assert needed <= shipped(root), sorted(needed - shipped(root))


def test_nothing_else_is_sent_but_what_it_reads(root: Path) -> None:
    folders = {Path(name).relative_to(PACKAGE).parts[0] for name in shipped(root) if "src/" in name}
    assert folders == {"__init__.py", "py.typed", *SENT}
    rest = {name for name in shipped(root) if not name.startswith(PACKAGE)}
    mirrors = {f"configs/mirrors/{file.name}" for file in (root / "configs/mirrors").iterdir()}
    assert rest == {"configs/models.yml"} | mirrors
    assert f"{PACKAGE}/basemodel/known.json" in shipped(root)


def test_it_works_without_the_rest(root: Path, tmp_path: Path) -> None:
    """The agent answers, the catalogue and the mirrors are read, and a run is looked at."""
    with tarfile.open(fileobj=io.BytesIO(sources.app_tar(root))) as archive:
        archive.extractall(tmp_path / "app", filter="data")
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/run.json").write_text('{"run_id": "one", "phases": []}')
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'app/src')!r})\n"
        "import tunesmith; from tunesmith.job.supervisor import agent, supervisor, worker\n"
        "from tunesmith.basemodel import catalogue, fetch, files\n"
        "from tunesmith.core import mirrors\n"
        "from tunesmith.job.services import manager\n"
        f"assert tunesmith.__file__.startswith({str(tmp_path)!r})\n"
        "assert catalogue.load_models(fetch.CONFIGS / 'models.yml')\n"
        "assert mirrors.load_mirror('cn', fetch.CONFIGS / 'mirrors')\n"
        f"sys.exit(agent.main(['--runs', {str(tmp_path / 'runs')!r}, 'runs']))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [run["run_id"] for run in json.loads(done.stdout)["runs"]] == ["one"]


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "configs", "docs"):
        shutil.copytree(root / name, tmp_path / name, ignore=ignored)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_only_a_change_of_what_runs_there_counts(clone: Path) -> None:
    def digests(name: str) -> tuple[str, str]:
        """Return the digests of what runs there, and of an image, with one file changed."""
        file = clone / name
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        sources.app_tar.cache_clear()
        found = sources.app_digest(clone), sources.image_digest(clone)
        file.write_bytes(before)
        return found

    sources.app_tar.cache_clear()
    app, image = sources.app_digest(clone), sources.image_digest(clone)
    outside = [
        *("report/report.html.j2", "report/sections.py", "cli/training.py", "cli/container.py"),
        *("plan/build.py", "targets/host.py", "hosts/replies.py", "dataset/check.py", "project.py"),
    ]
    for name in outside:
        now = digests(f"{PACKAGE}/{name}")
        assert now[0] == app, name
        assert now[1] != image, f"{name} is in the image"
    assert digests("docs/hosts.md") == (app, image)
    assert digests("pyproject.toml")[0] == app
    for name in (
        *(f"{PACKAGE}/job/supervisor/agent.py", f"{PACKAGE}/job/run/schema.py"),
        *(f"{PACKAGE}/core/files.py", f"{PACKAGE}/basemodel/known.json"),
        *("configs/models.yml", "configs/mirrors/cn.yml", f"{PACKAGE}/__init__.py"),
    ):
        now = digests(name)
        assert now[0] != app, name
        assert now[1] != image, name
    sources.app_tar.cache_clear()
    assert (sources.app_digest(clone), sources.image_digest(clone)) == (app, image)


def test_the_contract_has_a_version_among_what_is_compared(clone: Path) -> None:
    schema = clone / PACKAGE / "job/run/schema.py"
    text = schema.read_text(encoding="utf-8")
    assert text.count("\nCONTRACT = 1\n") == 1
    sources.app_tar.cache_clear()
    before = sources.app_digest(clone)
    schema.write_text(text.replace("\nCONTRACT = 1\n", "\nCONTRACT = 2\n"), encoding="utf-8")
    sources.app_tar.cache_clear()
    assert sources.app_digest(clone) != before
