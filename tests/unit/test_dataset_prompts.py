"""A prompts file is read whole or refused with the number of each bad entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.dataset.prompts import Prompt, load_prompts

pytestmark = pytest.mark.unit


def test_all_keys(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "prompts:\n  - prompt: 你是谁？\n    expect: '我是'\n    reference: r\n    system: s\n"
        "  - {prompt: b}\n",
        encoding="utf-8",
    )
    assert load_prompts(path) == (Prompt("你是谁？", "我是", "r", "s"), Prompt("b"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompts:\n  - prompt: a\n  - expect: b\n", ("entry 2: no prompt",)),
        ("prompts:\n  - prompt: ''\n", ("entry 1: no prompt",)),
        ("prompts:\n  - prompt: 3\n", ("entry 1: no prompt",)),
        ("prompts:\n  - {prompt: a, expekt: b}\n", ("entry 1: unknown key expekt", "expect")),
        ("prompts:\n  - {prompt: a, expect: '('}\n", ("entry 1: expect '('", "correct")),
        ("prompts:\n  - {prompt: a, system: 1}\n", ("entry 1: system is 1", "quotes")),
        ("prompts:\n  - hello\n", ("entry 1: 'hello' is no mapping", "- prompt:")),
        ("prompts: []\n", ("at least one",)),
        ("prompts:\n", ("at least one",)),
        ("prompt: []\n", ("prompts:, found prompt",)),
        ("- prompt: a\n", ("prompts:, found list",)),
        ("prompts: [\n", ("not YAML at line 2",)),
        ("prompts:\n  - prompt: a\n  - {}\n  - expect: '('\n", ("entry 2", "(and 2 more)")),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, text: str, told: tuple[str, ...]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_prompts(path)
    assert caught.value.exit_code == 2
    assert all(part in caught.value.message for part in (str(path), *told)), caught.value.message


def test_all_faults_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("prompts:\n  - {}\n  - {prompt: a, expect: '('}\n")
    with pytest.raises(UsageError) as caught:
        load_prompts(path)
    assert [line.split(":")[0] for line in caught.value.detail] == ["entry 1", "entry 2"]


def test_no_file_and_no_utf8(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_prompts(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_bytes(b"prompts: \xff")
    with pytest.raises(UsageError, match="byte 9"):
        load_prompts(tmp_path / "p.yaml")
