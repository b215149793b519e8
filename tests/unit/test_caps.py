"""What is handed to us is refused before it is met: by its kind, its size, its depth.

Memory is measured in a process of its own (VmHWM, which the machine's load does not change).
"""

from __future__ import annotations

import ast
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.basemodel import fetch as model_fetch
from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.catalogue import load_models
from tunesmith.basemodel.known import known, newer_types
from tunesmith.core import archive
from tunesmith.core.bounded import DEEPEST, depth_at, open_plain, parse_json
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.files import read_json, sha256_of
from tunesmith.core.mirrors import load_mirror
from tunesmith.dataset import registry
from tunesmith.dataset.check import check_file
from tunesmith.dataset.entry import Entry

pytestmark = pytest.mark.unit

_MEMORY = 500_000_000
# Long enough for any machine: who meets it hangs.
_HANG_SECONDS = 300
_HEAD = """
import re, sys
from pathlib import Path
from tunesmith.core.errors import TunesmithError
place = Path(sys.argv[1])
try:
    {work}
except TunesmithError as error:
    print(error.message)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
_CHECK = """
    from tunesmith.dataset.check import check_file
    from tunesmith.dataset.entry import Entry
    for fault in check_file(place, Entry(key="rows"), tables=lambda _: iter(())).findings:
        print(fault.line, fault.row, fault.message)
"""
_EXTRACT = """
    from tunesmith.core import archive
    (place.parent / "out").mkdir()
    archive.extract(place, place.parent / "out")
"""
_VERIFY = """
    from tunesmith.basemodel import files as modelfiles
    for problem in modelfiles.verify(place):
        print(problem)
"""


def met(work: str, place: Path) -> list[str]:
    """Return what is said of a file in a process of its own, which takes little memory."""
    argv = [sys.executable, "-c", _HEAD.format(work=work.strip()), str(place)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_HANG_SECONDS, check=True)
    *said, peak = done.stdout.splitlines()
    assert int(peak) * 1024 < _MEMORY, f"{int(peak) / 1000:.0f} MB: {said}"
    return said


def a_line(path: Path, begin: bytes, size: int = 120_000_000) -> Path:
    with path.open("wb") as stream:
        stream.write(begin)
        for _ in range(size // 1_000_000):
            stream.write(b"a" * 1_000_000)
    return path


@pytest.mark.parametrize(
    ("name", "begin", "told"),
    [
        ("rows.jsonl", b'{"instruction": "a", "output": "b"}\n{"instruction": "', "line 2 is long"),
        ("rows.json", b'[\n{"instruction": "', "a row of more than"),
        ("rows.csv", b"instruction,output\na,b\nc,d\n", "line 4 is longer than"),
        ("rows.txt", b"one\n", "line 2 is longer than"),
    ],
    ids=["lines", "list", "csv", "txt"],
)
def test_a_line_without_an_end_is_refused(
    tmp_path: Path, name: str, begin: bytes, told: str
) -> None:
    said = met(_CHECK, a_line(tmp_path / name, begin))
    assert any(told in line for line in said), said


def test_a_long_row_of_wide_characters_is_refused(tmp_path: Path) -> None:
    begin = '{"instruction": "\N{PILE OF POO}'.encode()
    assert any("longer" in line for line in met(_CHECK, a_line(tmp_path / "rows.jsonl", begin)))


@pytest.mark.parametrize("rows", [1, 3000], ids=["one row", "together"])
def test_more_keys_than_columns_are_refused(tmp_path: Path, rows: int) -> None:
    """Each was compared with each role of the entry: minutes for a million of them."""
    count = 3000
    file = tmp_path / "rows.json"
    keys = [f"k{number}" for number in range(count)]
    step = count // rows
    file.write_text(
        json.dumps([dict.fromkeys(keys[at : at + step], "") for at in range(0, count, step)])
    )
    said = [fault.message for fault in check_file(file, Entry(key="rows")).findings]
    assert [line for line in said if "3000" in line and "at most 1000" in line]


def test_of_a_run_of_commas_the_first_is_told(tmp_path: Path) -> None:
    file = tmp_path / "commas.json"
    file.write_text("[" + ", \n" * 100_000)
    told = [finding.message for finding in check_file(file, Entry(key="rows")).findings]
    assert told[0] == "a comma too many"
    # One more where the window of a long text ends in the run.
    assert len(told) < 10 and told[-1] == "the file ends inside the list"


def test_a_long_row_below_the_cap_is_read(tmp_path: Path) -> None:
    row = {"instruction": "a" * 20_000_000, "input": "", "output": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    report = check_file(tmp_path / "rows.jsonl", Entry(key="rows"))
    assert (report.rows, [f for f in report.findings if f.severity == "error"]) == (2, [])


@pytest.mark.parametrize("depth", [DEEPEST + 1, 5_000, 200_000])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_value_nested_too_deep_is_named(tmp_path: Path, depth: int, name: str) -> None:
    file = tmp_path / name
    deep = "[" * (depth - 1) + "]" * (depth - 1)
    row = '{"instruction": "a", "output": ' + deep + "}"
    file.write_text(f"[{row}]" if name.endswith(".json") else f"{row}\n")
    (fault, *_) = [f for f in check_file(file, Entry(key="rows")).findings if f.row == 1]
    assert fault.message.startswith(f"lists or objects nested {min(depth, 100_000)} deep")


def test_a_value_that_is_deep_enough_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    brackets = "[{" * 5_000
    deep = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    file.write_text(json.dumps({"instruction": brackets, "input": "", "output": "b"}) + "\n")
    assert not [f for f in check_file(file, Entry(key="rows")).findings if f.severity == "error"]
    assert depth_at(f'{{"a": {deep}}}') == 0
    assert depth_at('{"' + "[" * 500 + '": []}') == 2


@pytest.mark.parametrize("depth", [200, 100_000])
def test_json_of_every_kind_says_how_deep_it_is(tmp_path: Path, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    with pytest.raises(ValueError, match=f"nested {depth} deep"):
        parse_json(deep)
    (tmp_path / "dataset_info.json").write_text(deep)
    with pytest.raises(UsageError, match=f"dataset_info.json: .* nested {depth} deep"):
        registry.load_registry(tmp_path)
    model = a_model(tmp_path / "model")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        sound = (model / name).read_text()
        (model / name).write_text(deep)
        assert [str(p) for p in model_files.verify(model) if f"nested {depth} deep" in p.fault]
        (model / name).write_text(sound)
    assert model_files.verify(model) == ()


def test_long_json_that_is_nested_too_deep_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="nested 100000 deep"):
        parse_json("[" * 2_000_000)


def test_json_of_ours_that_is_too_deep_is_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        read_json(tmp_path / "status.json")


def a_model(folder: Path, header: bytes | None = None, body: bytes = b"\0\0\0\0") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    tensor = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(tensor).encode() if header is None else header
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


def one(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


@pytest.mark.parametrize(
    ("header", "body", "told"),
    [
        (b"{}", b"", "holds no tensor"),
        (b'{"__metadata__": {"format": "pt"}}', b"", "holds no tensor"),
        (b"[" * 100_000, b"", "damaged header (TooDeepError"),
        (one(a={"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}), b"\0" * 4, "17 dim"),
        (
            one(
                a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                b={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            ),
            b"\0" * 8,
            "tensor b begins at 4, expected 8",
        ),
    ],
)
def test_weights_that_are_none_are_not_verified(
    tmp_path: Path, header: bytes, body: bytes, told: str
) -> None:
    model = a_model(tmp_path / "model", header, body)
    assert [str(problem) for problem in model_files.verify(model) if told in problem.fault]
    assert model_files.verify(a_model(tmp_path / "model")) == ()


def test_a_header_of_weights_is_not_read_whatever_its_size(tmp_path: Path) -> None:
    model = a_model(tmp_path / "model")
    with (model / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 90_000_000))
        stream.truncate(90_000_100)
    said = met(_VERIFY, model)
    assert any("is no safetensors file" in line for line in said), said


def test_a_huge_tokenizer_is_not_read(tmp_path: Path) -> None:
    model = a_model(tmp_path / "model")
    a_line(model / "tokenizer.json", b'{"a": "')
    said = met(_VERIFY, model)
    assert any("tokenizer.json: is not JSON (has 120000007 bytes" in line for line in said), said


def a_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_socket(path: Path) -> Path:
    # Its path may be longer than a socket's name: bound where we are.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)
    return path


def a_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


STRANGE = [(a_pipe, "is a pipe"), (a_socket, "is a socket"), (a_device, "is a device")]


def ends(work: Callable[[], object]) -> None:
    """Do work that might wait for ever, and say so where it does."""
    raised: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told below
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a pipe or a device"
    if raised:
        raise raised[0]


@pytest.mark.parametrize(("make", "told"), STRANGE)
def test_data_that_are_no_file_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], told: str
) -> None:
    place = make(tmp_path / "rows.json")

    def work() -> None:
        report = check_file(place, Entry(key="rows"))
        assert [fault for fault in report.findings if told in fault.message]
        with pytest.raises(UsageError, match=told):
            registry.register(tmp_path, "rows", place)

    ends(work)


@pytest.mark.parametrize(("make", "told"), STRANGE)
def test_a_folder_of_data_with_no_file_in_it_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], told: str
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.json").write_text('[{"instruction": "a", "output": "b"}]')
    make(folder / "b.json")

    def work() -> None:
        report = check_file(folder, Entry(key="rows"))
        assert [f for f in report.findings if told in f.message and f.file == "b.json"]

    ends(work)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "extra.json"])
@pytest.mark.parametrize(("make", "told"), STRANGE)
def test_a_model_with_what_is_no_file_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], told: str, name: str
) -> None:
    model = a_model(tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    make(model / name)

    def work() -> None:
        assert [p for p in model_files.verify(model) if p.file == name and told in p.fault]
        with pytest.raises(OSError, match=r"not a file|No such device"):
            sha256_of(model / name)
        with pytest.raises(UsageError, match=told):
            archive.extract(model / name, tmp_path)

    ends(work)


def test_a_plain_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with open_plain(tmp_path / "a") as stream:
        assert stream.read() == b"abc"


def fetch(
    root: Path, place: Path, name: str, *, remote_code: bool = False
) -> model_fetch.ModelFolder:
    return model_fetch.fetch(
        name,
        models=load_models(root / "configs" / "models.yml"),
        mirror=load_mirror("default", root / "configs" / "mirrors"),
        hf_home=place / "hf",
        store=place / "store",
        remote_code=remote_code,
    )


def test_a_model_that_needs_code_is_refused_before_its_weights(tmp_path: Path, root: Path) -> None:
    model = a_model(tmp_path / "model")
    own = {"model_type": "evil", "architectures": ["X"], "auto_map": {"AutoConfig": "x.Y"}}
    (model / "config.json").write_text(json.dumps(own))
    # Weights that nobody may open: they would be read for their sums.
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")

    def work() -> None:
        with pytest.raises(UsageError, match=r"asks for code of its author .*'evil'"):
            fetch(root, tmp_path, str(model))

    ends(work)
    (model / "model.safetensors").unlink()
    a_model(model)
    (model / "config.json").write_text(json.dumps(own))
    assert fetch(root, tmp_path, str(model), remote_code=True).path == model
    (model / "config.json").write_text(json.dumps(own | {"model_type": "qwen2"}))
    assert fetch(root, tmp_path, str(model)).path == model


def tar_of(path: Path, header: tarfile.TarInfo, size: int) -> Path:
    """A tar whose first header announces `size` bytes, which follow it (a hole on the disk)."""
    header.size = size
    with path.open("wb") as stream:
        stream.write(header.tobuf(tarfile.USTAR_FORMAT))
        stream.seek((size + 511) // 512 * 512, io.SEEK_CUR)
        stream.write(tarfile.TarInfo("file").tobuf(tarfile.USTAR_FORMAT))
        stream.write(b"\0" * 1024)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    ],
)
def test_a_header_of_a_tar_that_is_huge_is_refused(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type = kind
    said = met(_EXTRACT, tar_of(tmp_path / "a.tar", header, 1_500_000_000))
    assert "a header of 1.5 GB says more about a file; nothing was unpacked" in said[0], said


def test_headers_that_only_lead_on_end(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 0
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) * 20_000 + b"\0" * 1024)
    (tmp_path / "out").mkdir()
    with pytest.raises(TunesmithError) as caught:
        archive.extract(tmp_path / "a.tar", tmp_path / "out")
    assert str(tmp_path / "a.tar") in caught.value.message


@pytest.mark.parametrize("major", ["0", "1"])
def test_a_sparse_file_of_a_tar_is_refused(tmp_path: Path, major: str) -> None:
    member = tarfile.TarInfo("x")
    member.pax_headers = {
        "GNU.sparse.major": major,
        "GNU.sparse.minor": "0",
        "GNU.sparse.size": "1",
        "GNU.sparse.numblocks": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.name": "x",
    }
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(member)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="is sparse"):
        archive.extract(tmp_path / "a.tar", tmp_path / "out")


def test_a_long_name_of_a_tar_is_still_read(tmp_path: Path) -> None:
    name = "a" * 200 + "/" + "b" * 90
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind) as made:
            made.addfile(tarfile.TarInfo(name))
        out = tmp_path / f"out{kind}"
        out.mkdir()
        archive.extract(tmp_path / "a.tar", out)
        assert (out / name).is_file()


def test_a_zip_whose_list_is_huge_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("a", "b")
    data = (tmp_path / "a.zip").read_bytes()
    end = data.rindex(b"PK\5\6")
    size = 600_000_000
    with (tmp_path / "a.zip").open("wb") as stream:
        stream.seek(size)
        stream.write(data[end : end + 12] + struct.pack("<II", size, 0) + data[end + 20 :])
    said = met(_EXTRACT, tmp_path / "a.zip")
    assert "its list of files has 600.0 MB; nothing was unpacked" in said[0], said


@pytest.mark.contract
def test_the_list_of_model_types_is_that_of_the_stack(training_python: Path) -> None:
    found = training_python.parents[1].glob("lib/python3*/site-packages/transformers/models/auto")
    text = (next(found) / "configuration_auto.py").read_text(encoding="utf-8")
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG_MAPPING_NAMES":
            assert isinstance(node.value, ast.Call)
            names = {key for key, _ in ast.literal_eval(node.value.args[0])}
    assert names == set(known().types)
    assert not names & set(newer_types())
