"""Pages that people read: two languages in step, links that lead somewhere, rows for every
failure we tell apart, and messages that are still printed."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tunesmith.core.errors import UsageError
from tunesmith.hosts.platforms import load_platforms
from tunesmith.hosts.ssh_errors import kind_of
from tunesmith.job.run.failures import CLASSES, classify_text
from tunesmith.maintain import failure_pages
from tunesmith.maintain.failure_pages import Section

pytestmark = pytest.mark.contract

PAIRS = ("README.md", "docs/platforms/autodl.md", "docs/failures.md")
CODE = (".py", ".yml", ".sh")
PAGES = ("*.md", "docs/**/*.md", "data/*.md", "benchmarks/*.md", "docker/*.md")

FENCE = re.compile(r"(^```.*?^```$)", re.S | re.M)
HEADING = re.compile(r"^(#+) (.+)$", re.M)
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMENT = re.compile(r"(?:^|\s+)# .*$")
# A command within a line, with its flags.
TYPED = re.compile(r"^(?:\.venv/bin/)?inv (?:--dry )?([a-z]+(?:\.[a-z]+)?)\b(.*)", re.S)


@dataclass
class Part:
    """A section of a page: what must be the same in another language."""

    level: int
    blocks: list[str] = field(default_factory=list)
    commands: Counter[str] = field(default_factory=Counter)
    rows: int = 0


def parts_of(text: str) -> list[Part]:
    """Return a page's sections. Comments in code blocks are prose and are left out."""
    parts = [Part(0)]
    for piece in re.split(FENCE, text):
        if piece.startswith("```"):
            parts[-1].blocks.append("\n".join(COMMENT.sub("", x) for x in piece.splitlines()))
            continue
        for section in re.split(r"(?m)^(?=#+ )", piece):
            if heading := HEADING.match(section):
                parts.append(Part(len(heading[1])))
            spans = (" ".join(span[2].split()) for span in SPAN.finditer(section))
            typed = [span for span in spans if re.match(r"(\S*/)?(inv|make|docker) ", span)]
            parts[-1].commands.update(typed)
            parts[-1].rows += len(re.findall(r"(?m)^\|", section))
    return parts


def pages(root: Path) -> list[Path]:
    return sorted({page for pattern in PAGES for page in root.glob(pattern)})


def anchors(text: str) -> set[str]:
    """Return the anchors GitHub gives a page's headings."""
    hidden = FENCE.sub("", text)
    names = (SPAN.sub(r"\2", found[2]) for found in HEADING.finditer(hidden))
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in names}


def sections(root: Path) -> tuple[Section, ...]:
    return failure_pages.load_sections(root / "configs" / "failures.yml")


@pytest.mark.parametrize("page", PAIRS)
def test_both_languages_say_the_same_commands_in_the_same_places(root: Path, page: str) -> None:
    english = parts_of((root / page).read_text(encoding="utf-8"))
    other = root / page.replace(".md", "_zh.md")
    chinese = parts_of(other.read_text(encoding="utf-8"))
    for number, (one, two) in enumerate(zip(english, chinese, strict=False)):
        assert one == two, f"section {number} of {page} and {other.name} differ"
    assert len(english) == len(chinese), f"{page} and {other.name} have other sections"
    assert len(english) > 3


def test_what_keeps_the_languages_in_step_sees_each_kind_of_drift() -> None:
    page = "# A\n\nDo `inv runs`.\n\n```\ninv train  # why\n```\n\n## B\n\n| a |\n|---|\n| b |\n"
    same = (
        "# 甲\n\n用 `inv runs`。\n\n```\ninv train  # 因\n```\n\n## 乙\n\n| 一 |\n|---|\n| 二 |\n"
    )
    assert parts_of(page) == parts_of(same)
    for was, now in (
        ("`inv runs`", "`inv logs`"),
        ("inv train", "inv merge"),
        ("## 乙", "### 乙"),
        ("| 二 |\n", ""),
        ("```\ninv train  # 因\n```\n", ""),
        ("## 乙\n", "## 乙\n\n## 丙\n"),
    ):
        assert was in same
        assert parts_of(page) != parts_of(same.replace(was, now)), was


def test_every_local_link_leads_somewhere(root: Path) -> None:
    seen = 0
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        prose = SPAN.sub("", FENCE.sub("", text))
        for link in LINK.findall(prose):
            if "://" in link or link.startswith("mailto:"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                found = anchors(target.read_text(encoding="utf-8"))
                assert anchor in found, f"{page}: {link}; there are {sorted(found)}"
            seen += 1
    assert seen > 30


def test_every_command_in_a_line_of_a_page_is_one(root: Path) -> None:
    """Lines of code blocks are parsed in test_house; these stand within sentences and tables."""
    import tasks

    flags = {context.name: set(context.flags) for context in tasks.ns.to_contexts()}
    seen = 0
    for page in pages(root):
        for span in SPAN.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
            if not (typed := TYPED.match(span[2])):
                continue
            name, rest = typed[1], typed[2]
            assert name in flags, f"{page}: there is no task {name}"
            told = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
            assert told <= flags[name], f"{page}: {name} has no {told - flags[name]}"
            seen += 1
    assert seen > 60


def test_the_first_page_names_every_task(root: Path) -> None:
    import tasks

    text = (root / "README.md").read_text(encoding="utf-8")
    for context in tasks.ns.to_contexts():
        assert f"`inv {context.name}`" in text, (
            f"README.md's table of commands lacks {context.name}"
        )


def test_the_pages_of_failures_are_as_rendered(root: Path) -> None:
    for path, text in failure_pages.render(root).items():
        assert path.read_text(encoding="utf-8") == text, f"`inv stack.render` renews {path}"


def test_every_failure_class_has_a_row_in_both_languages(root: Path) -> None:
    for page in ("failures.md", "failures_zh.md"):
        text = (root / "docs" / page).read_text(encoding="utf-8")
        for name in CLASSES:
            assert f"| **{name}**" in text, f"{page} lacks {name}"


def test_a_kind_without_a_row_is_refused(root: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((root / "configs/failures.yml").read_text(encoding="utf-8"))
    for section in raw:
        if section["kinds"] == "quotes":
            continue
        file, kept = tmp_path / "failures.yml", dict(section["rows"])
        lost = sorted(section["rows"])[0]
        del section["rows"][lost]
        file.write_text(yaml.safe_dump(raw), encoding="utf-8")
        with pytest.raises(UsageError, match=f"`{section['kinds']}`.*{lost}"):
            failure_pages.load_sections(file)
        section["rows"] = kept


def test_advice_that_is_not_the_runs_own_is_refused(root: Path, tmp_path: Path) -> None:
    text = (root / "configs/failures.yml").read_text(encoding="utf-8")
    file = tmp_path / "failures.yml"
    file.write_text(text.replace("fix the config; the key", "fix it; the key"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"`config`: the run's own advice"):
        failure_pages.load_sections(file)


def test_a_text_in_one_language_only_is_refused(root: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((root / "configs/failures.yml").read_text(encoding="utf-8"))
    del raw[1]["rows"]["clock"]["do"]["zh"]
    file = tmp_path / "failures.yml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(UsageError, match=r"`clock`: `do`"):
        failure_pages.load_sections(file)


def test_what_other_programs_print_is_told_apart_as_its_row_says(root: Path) -> None:
    for section in sections(root):
        for row in section.rows:
            # The jump host's ssh and our own print one line each.
            texts = ("\n".join(row.says),) if row.kind == "jump" else row.says
            for text in texts if not row.printed_by else ():
                if section.kinds == "run":
                    assert classify_text(text) == row.kind, text
                elif section.kinds == "ssh":
                    assert kind_of(text, jump=row.kind == "jump") == row.kind, text


def test_what_we_print_is_still_in_the_code(root: Path) -> None:
    codes = {
        folder: [one_line(file) for file in (root / folder).rglob("*.*") if file.suffix in CODE]
        for folder in ("src/tunesmith", "ansible/roles")
    }
    seen = 0
    for section in sections(root):
        for row in section.rows:
            for text in row.says if row.printed_by else ():
                pieces = [" ".join(piece.split()) for piece in text.split("...")]
                places = codes[row.printed_by]
                assert any(all(piece in code for piece in pieces) for code in places), text
                seen += 1
    assert seen > 20


def one_line(file: Path) -> str:
    """Return a source file with the messages that go over several lines in one piece."""
    return " ".join(re.sub(r'["\']\s*\n\s*f?["\']', "", file.read_text(encoding="utf-8")).split())


def test_remedies_name_the_same_commands_in_both_languages(root: Path) -> None:
    for section in sections(root):
        for row in section.rows:
            told = {
                language: Counter(re.findall(r"`[^`]+`", row.do[language])) for language in row.do
            }
            assert told["en"] == told["zh"], row.kind


def test_days_until_a_release_are_those_of_the_platform(root: Path) -> None:
    """The pages' figures and configs/platforms.yml are one."""
    known = {item.name: item for item in load_platforms(root / "configs" / "platforms.yml")}
    for page in ("autodl.md", "autodl_zh.md"):
        text = (root / "docs" / "platforms" / page).read_text(encoding="utf-8")
        assert re.search(rf"\b{known['autodl'].release_days}\b", text), page
        assert str(known["autodl"].poweroff[0]) in text, page


def test_the_security_page_speaks_of_the_versions_that_are_locked(root: Path) -> None:
    page = (root / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b[a-z][a-z0-9-]+==[0-9][0-9.]*[0-9]", page))
    locks = [path.read_text(encoding="utf-8") for path in (root / "configs/locks").glob("*.txt")]
    locked = set(re.findall(r"(?m)^([a-z0-9-]+==\S+)", "\n".join(locks)))
    assert named
    assert named <= locked, "look the advisories of the new version up, then change the page"


def test_the_hops_of_an_option_are_places_in_the_code(root: Path) -> None:
    """A hop that was renamed or dropped would be looked for in vain."""
    page = (root / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Three options, hop by hop\n")[2].partition("\n## ")[0]
    spans = [span[2] for span in SPAN.finditer(section)]
    hops = [text for text in spans if re.fullmatch(r"[a-z]\w*(\.\w+)+", text)]
    files = {text for text in hops if text.endswith((".json", ".yml"))}
    assert len(set(hops) - files) >= 18
    for hop in set(hops) - files:
        parts = hop.split(".")
        module = next(n for n in range(len(parts), 0, -1) if _module(root, parts[:n]).is_file())
        place: object = importlib.import_module(f"tunesmith.{'.'.join(parts[:module])}")
        for name in parts[module:]:
            fields = getattr(place, "__dataclass_fields__", {})
            assert name in fields or hasattr(place, name), hop
            place = getattr(place, name, None)


def _module(root: Path, parts: list[str]) -> Path:
    return root.joinpath("src/tunesmith", *parts).with_suffix(".py")
