"""The verbs on results: several runs side by side, and a merged model taken elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.cli.console import console, say
from tunesmith.core.errors import UsageError
from tunesmith.core.files import short_digest
from tunesmith.project import Project
from tunesmith.targets import factory

# Of a page's name: with a suffix of ours it must fit into the 255 bytes of a file's.
_LONGEST = 200


def compare(root: Path, on: str, names: Sequence[str], *, language: str) -> Path:
    """Write a page that sets runs side by side, and print the table."""
    from tunesmith.report.compare import comparison_table, write_comparison

    project = Project.at(root)
    if len(set(names)) < 2:
        raise UsageError("--compare takes two runs or more: `inv report --compare RUN1 RUN2`")
    target = factory.target_of(project, on, say)
    found = [target.find(name) for name in names]
    folders = [target.results(name) for name in found]
    page = write_comparison(
        folders, project.folder("comparisons") / page_name(found), language=language
    )
    console.print(comparison_table(folders, language=language))
    say(f"comparison: {page}")
    return page


def page_name(runs: Sequence[str]) -> str:
    """Return the file name of a comparison of runs: their ids, as far as a file's name can hold
    them all."""
    name = "+".join(runs)
    return f"{name if len(name) <= _LONGEST else f'{runs[0]}+{short_digest(runs)}'}.html"


def export(
    root: Path, on: str, run: str | None, kind: str, *, quantise: str, server: str, dry: bool
) -> None:
    """Turn a run's merged model into what another program takes, or check that it can."""
    from tunesmith.job.export.export import FORMATS

    if kind not in FORMATS:
        raise UsageError(f"--format {kind}: one of {', '.join(FORMATS)} expected")
    target = factory.target_of(Project.at(root), on, say)
    arguments = ["--run", str(target.location(target.find(run)).run), "--format", kind]
    arguments += ["--quantise", quantise] if quantise else []
    arguments += ["--server", server] if server else []
    if dry:
        say(f"python -I -m tunesmith.job.export.export {' '.join(arguments)}")
        return
    code = target.interact("tunesmith.job.export.export", arguments)
    if code:
        raise SystemExit(code)  # it has said why itself
