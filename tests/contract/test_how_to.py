"""The how-to pages name files that are there, and the names in them that they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.contract

SPAN = re.compile(r"`([^`\s]+)`")
FENCE = re.compile(r"```.*?```", re.S)
ARGUMENTS = re.compile(r'ARGS="([^"]*)"')
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
# Files as people know them, without a folder before them.
ENDING = re.compile(r"\.(?:py|sh|md|ya?ml|toml|txt|j2)$")
# A part of a path that stands for a name of the reader's.
ANY_NAME = re.compile(r"[A-Z]+(?:\.\w+)?")
PAGES = {
    "add-a-patch.md",
    "add-a-platform.md",
    "add-a-target.md",
    "add-a-training-stage.md",
    "add-a-verb.md",
    "change-a-version.md",
}


def pages(root: Path) -> list[Path]:
    return sorted((root / "docs/how-to").glob("*.md"))


def paths(text: str) -> set[str]:
    """Return the paths a page names, cut at the first part that is the reader's to choose."""
    spans = SPAN.findall(FENCE.sub("", text))
    words = [word for given in ARGUMENTS.findall(text) for word in given.split()]
    found = set()
    for name in [*spans, *words]:
        if not PATH.fullmatch(name) or ("/" not in name and not ENDING.search(name)):
            continue
        known: list[str] = []
        for part in name.rstrip("/").split("/"):
            if ANY_NAME.fullmatch(part):
                break
            known.append(part)
        found.add("/".join(known))
    return found - {""}


def test_these_are_the_pages(root: Path) -> None:
    assert {page.name for page in pages(root)} == PAGES


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_path_of_a_page_is_there(root: Path, name: str) -> None:
    found = paths((root / "docs/how-to" / name).read_text(encoding="utf-8"))
    assert len(found) >= 3
    missing = sorted(path for path in found if not (root / path).exists())
    assert missing == []


def test_every_name_of_code_is_in_a_file_of_the_page(root: Path) -> None:
    """A function or constant that moves takes its place on the page along."""
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        files = [root / path for path in paths(text) if (root / path).is_file()]
        code = "\n".join(file.read_text(encoding="utf-8") for file in files)
        names = re.findall(r"`(_?[A-Za-z]+_[A-Za-z_]+|[A-Z]{4,}S)`", FENCE.sub("", text))
        missing = [name for name in names if not re.search(rf"\b{name}\b", code)]
        assert missing == [], page.name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`src/x.py` and `docs/NAME.md`", {"src/x.py", "docs"}),
        ("`configs/train/NAME.yaml`, `configs/schema/`", {"configs/train", "configs/schema"}),
        ("`tasks.py`, `null`, `sft`, `--dry`, `a b/c.py`", {"tasks.py"}),
        ('make test ARGS="tests/unit/test_x.py -k patches"', {"tests/unit/test_x.py"}),
    ],
)
def test_what_a_path_is(text: str, found: set[str]) -> None:
    assert paths(text) == found
