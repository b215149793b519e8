"""A YAML file of `key: value` lines, read so that no line is lost and none means another thing.

PyYAML takes the last of two equal keys without a word, and joins a line with a full-width colon
(`key：value`) to the one before it.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tunesmith.core.bounded import MOST_OF_YAML, read_text
from tunesmith.core.documents import Arguments
from tunesmith.core.errors import UsageError

# A key that begins a line, and a colon of Chinese, Japanese or Korean text after it.
_WIDE_COLON = re.compile(r"^\s*([A-Za-z_]\w*)\s*[：﹕︰]", re.MULTILINE)
# A tab in front of a key: YAML wants spaces.
_TAB = re.compile(r"^( *\t+)\S", re.MULTILINE)


class _Repeated(yaml.YAMLError):
    """A key that stands twice in one mapping."""

    def __init__(self, key: str, first: int, again: int) -> None:
        super().__init__(key)
        self.key, self.first, self.again = key, first, again


class _Loader(yaml.SafeLoader):
    """The safe loader: a tag that would build a Python object is an error. Keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        """Build a mapping. Raises _Repeated for a key that stands twice."""
        lines: dict[object, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                raise _Repeated(key_node.value, lines[key_node.value], line)
            lines[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_mapping(file: Path) -> tuple[Arguments, str]:
    """Return what a file says, and its text.

    Raises UsageError that names the file and, where known, the line.

    LLaMA-Factory takes JSON too, and JSON is YAML.
    """
    try:
        text = read_text(file, MOST_OF_YAML)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such config", hint="`ls configs/train` shows ours") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not a UTF-8 text file ({type(error).__name__})") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}", hint="name a config file") from None
    except ValueError as error:
        raise UsageError(f"{file}: {error}", hint="name a config file") from None
    if wide := _WIDE_COLON.search(text):
        raise UsageError(
            f"{file}: line {_line(text, wide.start(1))}: a full-width colon follows `{wide[1]}`",
            hint=f"write `{wide[1]}: ` with the colon and the space of an English keyboard",
        )
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 (a subclass of the safe loader)
    except _Repeated as error:
        raise UsageError(
            f"{file}: line {error.again}: `{error.key}` stands in line {error.first} already",
            hint=f"remove one of the two lines of `{error.key}`",
        ) from None
    except yaml.YAMLError as error:
        if tab := _TAB.search(text):
            raise UsageError(
                f"{file}: line {_line(text, tab.start())}: begins with a tab",
                hint="indent with spaces, or not at all",
            ) from None
        raise UsageError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{file}: lists or keys nested too deeply to be read") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: must hold `key: value` lines, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, text


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
