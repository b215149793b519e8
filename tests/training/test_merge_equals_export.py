"""`merge` against LLaMA-Factory's export_model: the same files, byte by byte.

Small random models of the shapes that matter: an untied and a tied head, one file and several,
other dtypes, rank-stabilised LoRA, ranks and sizes that no block divides, and DoRA, which goes
through PEFT.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamafactory.train import tuner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config

from tunesmith.core.files import sha256_of
from tunesmith.job.inference import engine
from tunesmith.job.merge import inputs, matmul, skeleton, streaming
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.merge.adapter import check_fits
from tunesmith.job.merge.streaming import Shard
from tunesmith.job.proof.weights import weight_checks
from tunesmith.job.run.schema import RunRequest

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base model (the demo's or one of R1's shape, changed), an adapter, a dtype of the merge."""

    demo: bool = False
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    base_dtype: torch.dtype = torch.bfloat16
    base_shard: str = "5GB"
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    shard: str = ""


CASES = {
    "untied": Case(),
    "tied": Case(base={"tie_word_embeddings": True}),
    "several files": Case(base_shard="200KB", shard="150KB"),
    "float32 base": Case(base_dtype=torch.float32),
    "float16 base": Case(base_dtype=torch.float16),
    "float32": Case(dtype="float32"),
    "float16": Case(dtype="float16"),
    "rslora": Case(adapter={"r": 6, "use_rslora": True}),
    "odd sizes": Case(base={"intermediate_size": 1537}, adapter={"r": 12, "lora_alpha": 7}),
    "rank 64": Case(adapter={"r": 64}),
    "the demo model": Case(demo=True),
}


@dataclass(frozen=True)
class Compared:
    """What the export and our merge made of a case; hashes by file name.

    `numpy` is the merge by NumPy beside ours: numbers that differ, all numbers, and how far apart
    at most, in the last bits of each tensor's largest value.
    """

    theirs: dict[str, str]
    ours: dict[str, str]
    way: matmul.Products
    foreseen: bool
    proof: dict[str, bool | None]
    numpy: tuple[int, int, float]


class Bench:
    """The folder where all this is made, and what was made already."""

    def __init__(self, top: Path, tiny: Path, demo: Path) -> None:
        self.top, self.tiny, self.demo = top, tiny, demo
        self._compared: dict[str, Compared] = {}

    def compared(self, name: str) -> Compared:
        if name not in self._compared:
            self._compared[name] = self._compare(name, CASES[name])
        return self._compared[name]

    def base(self, name: str, case: Case) -> Path:
        if case.demo:
            return self.demo
        if (case.base, case.base_dtype, case.base_shard) == ({}, torch.bfloat16, "5GB"):
            return self.tiny
        folder = self.top / f"base of {name}"
        config = Qwen2Config.from_pretrained(self.tiny)
        for key, value in case.base.items():
            setattr(config, key, value)
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).to(case.base_dtype)
        model.save_pretrained(folder, max_shard_size=case.base_shard)
        AutoTokenizer.from_pretrained(self.tiny).save_pretrained(folder)
        return folder

    def adapter(self, name: str, base: Path, **config: Any) -> Path:
        folder = self.top / f"adapter of {name}"
        torch.manual_seed(3)
        plain = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
        given = {"r": 8, "lora_alpha": 16, "target_modules": MODULES} | config
        adapted = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **given))
        with torch.no_grad():
            for key, weight in adapted.named_parameters():
                if "lora_B" in key:
                    weight.normal_(std=0.02)
        adapted.save_pretrained(folder)
        return folder

    def _compare(self, name: str, case: Case) -> Compared:
        base = self.base(name, case)
        assert case.base_shard == "5GB" or len(list(base.glob("*.safetensors"))) > 2
        adapter = self.adapter(name, base, **case.adapter)
        keys = inputs.export_keys({"infer_dtype": case.dtype}, base)
        config = config_of(base, adapter)
        theirs, ours, once, apart = (
            self.top / f"{kind} {name}" for kind in ("theirs", "ours", "once", "apart")
        )
        for folder in (ours, once, apart):
            folder.mkdir()
        shards = _exported(case, config, keys, adapter, theirs, ours)
        facts = check_fits(base, adapter)
        assert streaming.why_not(facts, [str(adapter)], keys, config, base) is None
        way = matmul.best()
        also = [base / "config.json"]
        made = streaming.merge(base, facts, shards, ours, way, 3, also, hashed=True)
        assert made.hashes == {path: sha256_of(path) for path in made.hashes}
        assert len(made.hashes) == len(shards) + 1
        # One process, and NumPy's own rounding.
        streaming.merge(base, facts, shards, once, dataclasses.replace(way, convert=None))
        for shard in shards:
            assert made.hashes[ours / shard.file] == sha256_of(once / shard.file)
        streaming.merge(base, facts, shards, apart, matmul.by_numpy())
        proof = weight_checks(base, ours, facts, case.dtype)
        compared = Compared(
            theirs={file.name: sha256_of(file) for file in sorted(theirs.iterdir())},
            ours={file.name: sha256_of(file) for file in sorted(ours.iterdir())},
            way=way,
            foreseen=shards
            == streaming.predicted_files(base, inputs.SAFETENSORS_NAMES[case.dtype], 5),
            proof={check.name: check.passed for check in proof},
            numpy=_difference([(ours / shard.file, apart / shard.file) for shard in shards]),
        )
        for folder in (theirs, ours, once, apart):
            shutil.rmtree(folder)
        return compared


def _exported(
    case: Case,
    config: dict[str, Any],
    keys: dict[str, Any],
    adapter: Path,
    theirs: Path,
    ours: Path,
) -> list[Shard]:
    """Export by LLaMA-Factory, whole and then without weights; return the files of these."""
    args = {**engine.arguments(config), **keys, "export_legacy_format": False}
    given = {**args, "adapter_name_or_path": str(adapter), "export_dir": str(theirs)}
    save = PreTrainedModel.save_pretrained

    def cut(self: Any, *positional: Any, **named: Any) -> Any:
        return save(self, *positional, **{**named, "max_shard_size": case.shard})

    with pytest.MonkeyPatch.context() as patched:
        if case.shard:
            # export_size is a whole number of GB: files of a tiny model are cut here.
            patched.setattr(PreTrainedModel, "save_pretrained", cut)
        tuner.export_model(given)
        return skeleton.without_weights(tuner, {**args, "export_dir": str(ours)})


def _difference(files: list[tuple[Path, Path]]) -> tuple[int, int, float]:
    off = total = 0
    steps = 0.0
    for one, other in files:
        left, right = load_file(one), load_file(other)
        for key, value in left.items():
            total += value.numel()
            off += int((value != right[key]).sum())
            # A rounding error is as large as the sums that were rounded, not as their result.
            step = torch.finfo(value.dtype).eps * float(value.abs().max())
            apart = float((value.double() - right[key].double()).abs().max())
            steps = max(steps, apart / step if apart else 0.0)
    return off, total, steps


def config_of(base: Path, adapter: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(base),
        "output_dir": str(adapter),
        "stage": "pt",
        "finetuning_type": "lora",
        "template": "deepseekr1",
    }


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, base_model: Path, r1_model: Path
) -> Iterator[Bench]:
    top = tmp_path_factory.mktemp("export")
    yield Bench(top, r1_model, base_model)
    shutil.rmtree(top)


@pytest.mark.parametrize("case", CASES)
def test_every_file_is_the_exports(bench: Bench, case: str) -> None:
    made = bench.compared(case)
    assert made.ours == made.theirs
    assert {"config.json", "tokenizer.json", "Modelfile", "generation_config.json"} <= set(
        made.ours
    )
    assert any(name.endswith(".safetensors") for name in made.ours)


@pytest.mark.parametrize("case", CASES)
def test_the_library_rounds_where_it_multiplies(bench: Bench, case: str) -> None:
    way = bench.compared(case).way
    assert (way.convert is not None) is (way.name == "mkl of torch")


def test_several_files_come_with_their_index(bench: Bench) -> None:
    names = set(bench.compared("several files").ours)
    assert "model.safetensors.index.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 2


@pytest.mark.parametrize("case", CASES)
def test_every_merge_is_what_the_proof_recomputes(bench: Bench, case: str) -> None:
    checks = ("structure", "untouched", "recomputed", "effect")
    assert bench.compared(case).proof == dict.fromkeys(checks, True)


@pytest.mark.parametrize("case", CASES)
def test_a_single_file_is_foreseen(bench: Bench, case: str) -> None:
    assert bench.compared(case).foreseen is (case != "several files")


@pytest.mark.parametrize("case", CASES)
def test_numpy_rounds_a_few_numbers_to_the_other_neighbour(bench: Bench, case: str) -> None:
    """How many sums end in another last bit depends on the processor; how far they lie does not.

    In 16 bits nearly all such bits are rounded away, in float32 none is.
    """
    off, total, steps = bench.compared(case).numpy
    assert steps <= 4
    assert case == "float32" or off <= total * 1e-3


def merged_by_phase(
    bench: Bench, name: str, adapter: Path
) -> tuple[dict[str, str], list[dict[str, Any]], dict[str, Any]]:
    """Run the phase itself; return the hashes of its files, its events and its summary."""
    run = bench.top / f"run {name}"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config_of(bench.tiny, adapter)))
    events: list[dict[str, Any]] = []

    def emit(event: str, **values: Any) -> None:
        events.append({"event": event, **values})

    summary = merge_phase.run(run, RunRequest(merge={}), emit)
    files = {file.name: sha256_of(file) for file in sorted((run / "merged").iterdir())}
    return files, [event for event in events if event.get("what") == "merge"], summary


def test_the_phase_writes_the_exports_weights(bench: Bench) -> None:
    untied = bench.compared("untied")
    files, told, summary = merged_by_phase(bench, "plain", bench.top / "adapter of untied")
    assert files["model.safetensors"] == untied.theirs["model.safetensors"]
    assert summary["arithmetic"] == untied.way.name
    assert not told


def test_what_is_more_than_a_sum_goes_through_peft_and_is_said(bench: Bench) -> None:
    adapter = bench.adapter("dora", bench.tiny, use_dora=True)
    files, told, summary = merged_by_phase(bench, "dora", adapter)
    assert [event["why"] for event in told] == ["use_dora"]
    assert summary["arithmetic"] == "peft"
    theirs = bench.top / "theirs dora"
    args = engine.arguments(config_of(bench.tiny, adapter), adapters=[adapter])
    keys = inputs.export_keys({}, bench.tiny)
    tuner.export_model({**args, **keys, "export_dir": str(theirs), "export_legacy_format": False})
    assert files["model.safetensors"] == sha256_of(theirs / "model.safetensors")
