"""The required files of a base model folder, and their verification. Standard library, Python 3.10.

It finds a truncated shard or a config that is not JSON in seconds, on any machine, instead of
`SafetensorError: MetadataIncompleteBuffer` minutes into a paid job. Weights are not loaded: the
header of a safetensors file defines the rest of it (https://huggingface.co/docs/safetensors: 8
bytes little-endian length, JSON, tensors).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.bounded import TooDeepError, kind_fault, open_plain, parse_json, read_bytes
from tunesmith.core.documents import JsonObject
from tunesmith.core.errors import UsageError
from tunesmith.core.files import sha256_of

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TAKEN = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
)
# Loading one of these can run arbitrary code.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5")
_STANDARD_WEIGHTS = re.compile(r"^model(-\d{5}-of-\d{5})?\.safetensors$")
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")

# A tokenizer needs one of these sets.
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)

# A quarter of what the safetensors library allows: 200 000 tensors in one file.
_MAX_HEADER = 25_000_000
_MOST_DIMENSIONS, _LONGEST_DIMENSION = 16, 1 << 48
_ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and sha256 as 64 hex digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """One fault: the file, and what is wrong with it (expected and found)."""

    file: str
    fault: str

    def __str__(self) -> str:
        return f"{self.file}: {self.fault}"


Shapes = dict[str, tuple[str, tuple[int, ...]]]


def choose(names: Iterable[str], allow_pickle: bool = False) -> tuple[str, ...]:
    """Return the `names` that a base model needs: safetensors, JSON, tokenizer files.

    Only the top folder is used. Beside the standard weights, other safetensors (Mistral's
    consolidated copy, fp16 variants) are skipped. Pickles are included only with `allow_pickle`,
    and only without safetensors; Python never is.
    """
    plain = sorted(name for name in names if _PLAIN_NAME.match(name))
    taken = [name for name in plain if _is_like(name, _TAKEN)]
    weights = [name for name in taken if name.endswith(".safetensors")]
    standard = [name for name in weights if _STANDARD_WEIGHTS.match(name)]
    dropped = set(weights) - set(standard) if standard else set()
    if not allow_pickle or weights:
        # The index of pickled weights does not describe the chosen files.
        dropped |= {name for name in taken if name.endswith(".bin.index.json")}
        return tuple(name for name in taken if name not in dropped)
    return tuple(sorted({*taken, *pickles(plain)}))


def pickles(names: Iterable[str]) -> tuple[str, ...]:
    """Return the `names` of weights in a format that can run code."""
    return tuple(sorted(name for name in names if _is_like(name, _PICKLES)))


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, in any format that is taken."""
    return name.endswith(".safetensors") or _is_like(name, _PICKLES)


def weight_bytes(folder: Path) -> int | None:
    """Return the bytes of the weights a load would take; None where there are none."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    weights = [name for name in choose(names, allow_pickle=True) if is_weights(name)]
    return sum((folder / name).stat().st_size for name in weights) or None


def verify(
    folder: Path,
    expected: Mapping[str, FileRecord] | None = None,
    hashes: bool = False,
    allow_pickle: bool = False,
) -> tuple[Problem, ...]:
    """Return every fault of a base model folder; without faults it can be loaded.

    Always checked: config.json, tokenizer, each safetensors file against its own header (a
    truncated one is reported with expected and found size), the index against its shards.
    `expected` adds existence and size of its files, `hashes` their sha256.
    """
    if not folder.is_dir():
        return (Problem(str(folder), "is not a folder"),)
    if strange := _no_files(folder, allow_pickle):
        return strange
    problems: list[Problem] = []
    for name, record in (expected or {}).items():
        problems += _against_record(folder, name, record, hashes)
    named = {problem.file for problem in problems}
    structural = [*_config(folder), *_tokenizer(folder), *_weights(folder, allow_pickle)]
    # A file with a fault needs no second message.
    return (*problems, *(p for p in structural if p.file not in named))


def require(
    folder: Path,
    name: str | None = None,
    expected: Mapping[str, FileRecord] | None = None,
    hashes: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Raise UsageError with every fault of the folder unless it is a complete base model.

    `name` is the user's name of the model; the message suggests downloading it again.
    """
    problems = verify(folder, expected, hashes, allow_pickle)
    if problems:
        raise damaged(folder, problems, name)


def damaged(folder: Path, problems: tuple[Problem, ...], name: str | None = None) -> UsageError:
    """Return the error with a folder's faults and the command that fixes them."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    own = not name or name.startswith("/")
    return UsageError(
        f"{folder}: not a complete base model: {problems[0]}{more}",
        [str(problem) for problem in problems],
        hint="copy the folder again, or name the model as it is called on the hub (owner/name)"
        if own
        else f"download it with `inv model.fetch {name}`",
    )


def tensor_shapes(folder: Path) -> Shapes:
    """Return {tensor name: (dtype, shape)} of all safetensors files that loading would use.

    dtype is safetensors' name (BF16, F32, ...). Raises UsageError for an invalid header.
    """
    shapes: Shapes = {}
    for file in weight_files(folder):
        header, fault = _header(file)
        if fault:
            raise UsageError(f"{file}: {fault}")
        shapes |= {name: (entry[0], entry[1]) for name, entry in header.items()}
    return shapes


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files that loading would use, sorted by name."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return tuple(folder / name for name in choose(names) if name.endswith(".safetensors"))


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _against_record(
    folder: Path, name: str, record: FileRecord, hashes: bool
) -> tuple[Problem, ...]:
    path = folder / name
    if not path.is_file():
        return (Problem(name, f"missing, expected {record.size} bytes"),)
    size = path.stat().st_size
    if size != record.size:
        return (Problem(name, f"expected {record.size} bytes, found {size}"),)
    if hashes and (found := sha256_of(path)) != record.sha256:
        return (Problem(name, f"expected sha256 {record.sha256}, found {found}"),)
    return ()


def _no_files(folder: Path, allow_pickle: bool) -> tuple[Problem, ...]:
    """Return required names that are not regular files: reading them could block."""
    problems = []
    for name in choose((path.name for path in folder.iterdir()), allow_pickle):
        try:
            fault = kind_fault(folder / name)
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}"))
            continue
        if fault:
            problems.append(Problem(name, f"{fault}, not a file"))
    return tuple(problems)


def _config(folder: Path) -> list[Problem]:
    value, fault = json_object(folder / CONFIG)
    if fault:
        return [Problem(CONFIG, fault)]
    lacking = [key for key in ("model_type", "architectures") if not value.get(key)]
    if lacking:
        return [Problem(CONFIG, f"has no {' and no '.join(lacking)}: not a transformers model")]
    return []


def _tokenizer(folder: Path) -> list[Problem]:
    problems = []
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        tiktoken = any(folder.glob("*.tiktoken"))
        if not tiktoken:
            problems.append(Problem("tokenizer.json", "missing, and no other tokenizer is there"))
    if not (folder / "tokenizer_config.json").is_file():
        problems.append(Problem("tokenizer_config.json", "missing"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json"):
        if (folder / name).is_file():
            _, fault = json_object(folder / name)
            problems += [Problem(name, fault)] if fault else []
    return problems


def _weights(folder: Path, allow_pickle: bool) -> list[Problem]:
    names = {path.name for path in folder.iterdir() if path.is_file()}
    files = weight_files(folder)
    if not files and INDEX not in names:
        return _without_safetensors(names, allow_pickle)
    problems = []
    held: dict[str, set[str]] = {}
    for file in files:
        header, fault = _header(file)
        held[file.name] = set(header)
        problems += [Problem(file.name, fault)] if fault else []
    broken = {problem.file for problem in problems}
    # transformers reads model.safetensors first and ignores an index beside it.
    if WEIGHTS in names or INDEX not in names:
        return problems
    return [*problems, *_index(folder, held, broken)]


def _without_safetensors(names: set[str], allow_pickle: bool) -> list[Problem]:
    found = pickles(names)
    if found and allow_pickle:
        return []
    if found:
        fault = (
            f"only pickled weights are here ({', '.join(found[:3])}), which can run code when "
            "loaded; `--allow-pickle` takes them from an author you trust"
        )
        return [Problem(found[0], fault)]
    return [Problem(WEIGHTS, "missing: the folder has no weights")]


def _index(folder: Path, held: Mapping[str, set[str]], broken: set[str]) -> list[Problem]:
    value, fault = json_object(folder / INDEX)
    where = value.get("weight_map")
    if not fault and not (
        isinstance(where, dict) and where and all(isinstance(v, str) for v in where.values())
    ):
        fault = "has no weight_map of tensor names to shards"
    if fault or not isinstance(where, dict):
        return [Problem(INDEX, fault)]
    problems = [
        Problem(shard, f"missing, named in {INDEX}")
        for shard in sorted(set(where.values()) - set(held))
    ]
    for shard in sorted(set(where.values()) & set(held) - broken):
        lacking = sorted(t for t, s in where.items() if s == shard and t not in held[shard])
        if lacking:
            fault = f"lacks {len(lacking)} tensors the index puts there, first {lacking[0]}"
            problems.append(Problem(shard, fault))
    return problems


def _header(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], str]:
    """Return ({tensor: (dtype, shape)}, fault or "") after checking the file's extent."""
    size = file.stat().st_size
    with open_plain(file) as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > _MAX_HEADER:
            return {}, f"is no safetensors file ({size} bytes, a header of {length})"
        if size < 8 + length:
            return {}, f"is cut: expected at least {8 + length} bytes, found {size}"
        text = stream.read(length)
    try:
        value = parse_json(text)
        entries = {
            str(name): _entry(entry) for name, entry in value.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"has a damaged header ({type(error).__name__}: {error})"
    if not entries:
        return {}, "holds no tensor"
    end = 0
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end:
            return {}, f"has a damaged header: tensor {name} begins at {begin}, expected {end}"
        end = stop
    if size != 8 + length + end:
        kind = "is cut" if size < 8 + length + end else "is too long"
        return {}, f"{kind}: expected {8 + length + end} bytes, found {size}"
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in entries.items()}, ""


def _entry(entry: JsonObject) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    begin, stop = (int(n) for n in entry["data_offsets"])
    bits = _ITEM_BITS.get(dtype)
    if len(shape) > _MOST_DIMENSIONS or max((0, *shape)) > _LONGEST_DIMENSION:
        raise ValueError(f"{len(shape)} dimensions, or one that is too long")
    if bits is None:
        raise ValueError(f"unknown dtype {dtype}")
    if min((0, begin, *shape)) < 0 or (stop - begin) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{dtype}{list(shape)} does not take bytes {begin} to {stop}")
    return dtype, shape, begin, stop


def json_object(path: Path) -> tuple[JsonObject, str]:
    """Return (the object in a small file of a model folder, fault or "")."""
    try:
        value = parse_json(read_bytes(path))
    except FileNotFoundError:
        return {}, "missing"
    except OSError as error:
        return {}, f"cannot be read: {error.strerror}"
    except TooDeepError as error:
        return {}, str(error)
    except ValueError as error:
        return {}, f"is not JSON ({error})"
    return (value, "") if isinstance(value, dict) else ({}, "is not a JSON object")
