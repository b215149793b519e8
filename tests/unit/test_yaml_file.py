"""Configs as people write them: each fault with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import UsageError
from tunesmith.plan.yaml_file import read_mapping


def written(folder: Path, text: str) -> Path:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: `a` stands in line 1 already", "remove one"),
        ("m:\n  a: 1\n  a: 2\n", "line 3: `a` stands in line 2 already", "remove one"),
        ('{"a": 1, "a": 2}', "line 1: `a` stands in line 1 already", "remove one"),
        ("a: 1\nstage：sft\n", "line 2: a full-width colon follows `stage`", "write `stage: `"),
        ("stage ：sft\n", "line 1: a full-width colon", "write `stage: `"),
        ("a: 1\n\tb: 2\n", "line 2: begins with a tab", "spaces"),
        ("just words\n", "must hold `key: value` lines, found str", ""),
        ("- a\n- b\n", "must hold `key: value` lines, found list", ""),
        ("a: [1\n", "not YAML", ""),
        ("a: !!python/object/apply:os.system [ls]\n", "not YAML", ""),
        ("", "must hold `key: value` lines, found NoneType", ""),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, text: str, message: str, hint: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_mapping(file)
    assert error.value.message.startswith(f"{file}: ")
    assert message in error.value.message
    assert hint in error.value.hint


def test_what_is_right_is_read(tmp_path: Path) -> None:
    text = "a: 1  # 中文：a comment\nb: 'x：y'\nc: &c {d: [1, 2]}\ne: *c\nf：g: 1\n"
    with pytest.raises(UsageError):  # a key with such a colon is one forgotten
        read_mapping(written(tmp_path, text))
    text = text.replace("f：g: 1\n", "")
    assert read_mapping(written(tmp_path, text))[0] == {
        "a": 1,
        "b": "x：y",
        "c": {"d": [1, 2]},
        "e": {"d": [1, 2]},
    }


def test_keys_merged_from_another_mapping_may_be_given_anew(tmp_path: Path) -> None:
    text = "base: &b {a: 1, c: 2}\nown:\n  <<: *b\n  a: 3\n"
    assert read_mapping(written(tmp_path, text))[0]["own"] == {"a": 3, "c": 2}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_mapping(tmp_path / "none.yaml")
    assert error.value.message == f"{tmp_path}/none.yaml: no such config"
    assert error.value.hint == "`ls configs/train` shows ours"
