"""Keys of a config that name a file or a folder, and what must be there before anything starts.

Models and adapters, which may be names of a hub too, are plan/models.py's.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.core import documents
from tunesmith.core.bounded import parse_json, read_bytes
from tunesmith.core.errors import UsageError
from tunesmith.job.run.inputs import JSON_KEYS

# Folders that a run makes where they are not there.
CACHES = ("tokenized_path", "cache_dir")
# What datasets.save_to_disk leaves: one of these in a folder that load_from_disk reads.
_SAVED = ("dataset_dict.json", "state.json")


def check(file: Path, values: documents.Config) -> None:
    """Check that what the path keys of `values` name is there, and is what it must be.

    The paths are absolute. Raises UsageError that names `file`, key and value.
    """
    for key in (*JSON_KEYS, "media_dir", *CACHES, "export_quantization_dataset"):
        value = values.get(key)
        if not isinstance(value, str):
            continue
        try:
            _check(key, value)
        except _Fault as fault:
            raise UsageError(f"{file}: `{key}` is {value}: {fault}", hint=fault.hint) from None


class _Fault(Exception):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _check(key: str, value: str) -> None:
    if key in JSON_KEYS:
        _check_json(key, value)
        return
    path = Path(value)
    if key == "export_quantization_dataset":
        if path.is_absolute() and not path.is_file():
            raise _Fault("no such file", "name a file of rows, or a data set of a hub")
    elif path.exists() and not path.is_dir():
        raise _Fault("a file, a folder expected", f"name the folder: `{key}: {path.parent}`")
    elif key == "media_dir" and not path.exists():
        raise _Fault("no such folder", "name the folder that images, videos and audios lie in")
    elif key == "tokenized_path" and path.exists():
        names = {entry.name for entry in path.iterdir()}
        if names and not names & set(_SAVED):
            raise _Fault(
                "holds other files and no tokenised data set",
                "name a new folder: the tokenised rows are written there",
            )


def _check_json(key: str, value: str) -> None:
    inline = value.startswith("{")
    try:
        content = parse_json(value.encode() if inline else read_bytes(Path(value)))
    except FileNotFoundError:
        hint = f"name a JSON file that exists, or write the mapping below `{key}:` itself"
        raise _Fault("no such file", hint) from None
    except OSError as error:
        raise _Fault(f"cannot be read: {error.strerror}", "name a JSON file") from None
    except ValueError as error:
        where = "" if inline else f" of {value}"
        raise _Fault(f"not JSON: {error}", f"mend the JSON{where}") from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise _Fault(f"must hold a JSON object, found {found}", "name a file with {...} in it")
