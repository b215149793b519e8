"""Planted faults, on the demo model and on a stand-in of DeepSeek-R1-Distill-Qwen's shape.

Each is planted as a wrong merge would leave it, with a manifest that agrees: what finds it is the
proof, not the hashes (they are tried apart). Adapters have random weights: what is proven here
does not depend on how one came about.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.evaluation import chat
from tunesmith.job.export import export, gguf_writer
from tunesmith.job.inference import engine
from tunesmith.job.inference.engine import Codec
from tunesmith.job.merge import manifest
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.merge.adapter import AdapterFacts, check_fits
from tunesmith.job.prompts import parity
from tunesmith.job.proof import phase as proof_phase
from tunesmith.job.proof.weights import file_check, weight_checks
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest

QUESTIONS = ("Who are you?", "你好，你是谁？")
# Templates of every kind: BOS in the prefix, in each question, nowhere; system text in the first
# question; a default system text; other reasoning templates.
TEMPLATES = ("atom", "gemma", "llama2", "llama3", "mistral", "qwen", "qwen3", "vicuna")


@dataclass
class Merged:
    """A run folder whose training has ended, and what is done in it afterwards."""

    kind: str
    run: Path
    config: dict[str, Any]
    request: RunRequest
    events: list[dict[str, Any]] = field(default_factory=list)

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    @property
    def base(self) -> Path:
        return Path(self.config["model_name_or_path"])

    @property
    def merged(self) -> Path:
        return self.run / "merged"

    @property
    def weights(self) -> Path:
        return self.merged / "model.safetensors"

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder."""
        value: dict[str, Any] = json.loads((self.run / name).read_text(encoding="utf-8"))
        return value

    @functools.cached_property
    def facts(self) -> AdapterFacts:
        return check_fits(self.base, Path(self.config["output_dir"]))

    @functools.cached_property
    def codec(self) -> Codec:
        return engine.codec(engine.arguments(self.config))

    def beside(self, name: str, **change: Any) -> Merged:
        """A run with another config on the same base and adapter."""
        folder = self.run.parent / name
        folder.mkdir()
        config = self.config | change
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return Merged(self.kind, folder, config, self.request)

    @functools.cached_property
    def target(self) -> str:
        """The first tensor that the adapter changes."""
        return str(min(self.facts.targets.values()))

    @functools.cached_property
    def norm(self) -> str:
        """The first tensor of a kind that it does not."""
        names = (n for n in load_file(self.weights) if n.endswith("input_layernorm.weight"))
        return str(min(names))

    @contextlib.contextmanager
    def altered(self) -> Iterator[None]:
        """Whatever is done within this to the merged model and to the run's files is undone."""
        files = [f for folder in (self.run, self.merged) for f in folder.iterdir() if f.is_file()]
        kept = {file: file.read_bytes() for file in files}
        try:
            yield
        finally:
            if not self.merged.exists():
                (self.run / "merged.refused").rename(self.merged)
            for file, content in kept.items():
                file.write_bytes(content)

    def failed(self, base: Path | None = None) -> list[str]:
        """The checks that fail, with a manifest that agrees; `base` is another base model.

        The whole proof where that is quick, else the checks that need no answers.
        """
        if base is None:
            made_of = self.read("merged/MANIFEST.json")
            origin = {item.name: made_of[item.name] for item in dataclasses.fields(manifest.Origin)}
            manifest.write(self.merged, manifest.Origin(**origin))
        if self.kind == "tiny" and base is None:
            try:
                proof_phase.run(self.run, self.request, self.emit)
            except TunesmithError:
                checks = self.read("proof.json")["checks"]
                return [check["name"] for check in checks if check["passed"] is False]
            return []
        found = [file_check(self.merged)[0]]
        found += weight_checks(base or self.base, self.merged, self.facts, "bfloat16")
        found.append(proof_phase.parity_check(self.run, self.config, self.codec, self.merged))
        return [check.name for check in found if check.passed is False]


def prepare(kind: str, top: Path, base: Path, template: str, **extra: Any) -> Merged:
    """Write a run folder as a finished training leaves it, and its data."""
    rows = [
        {"instruction": f"Question {n}?", "input": "", "output": f"答案 {n}。"} for n in range(9)
    ]
    thoughts = [row | {"output": f"<think>\nhm\n</think>\n\n{row['output']}"} for row in rows]
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {}
    for name, data in (("rows", rows), ("thoughts", thoughts)):
        (top / f"{name}.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json", "columns": columns}
    (top / "dataset_info.json").write_text(json.dumps(info))
    run = top / "run"
    run.mkdir()
    config = {
        "model_name_or_path": str(base),
        "stage": "sft",
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(top),
        "template": template,
        "output_dir": str(run / "output"),
        **extra,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    prompts = [{"prompt": "Who are you?", "expect": None, "reference": None, "system": None}]
    request = {"prompts": prompts, "evaluate": {"max_new_tokens": 8}, "merge": {}}
    (run / "run.json").write_text(json.dumps(request), encoding="utf-8")

    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    options = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]
    )
    adapted = get_peft_model(plain, options)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted.save_pretrained(config["output_dir"])
    return Merged(kind, run, config, RunFolder(run).request())


def merged_and_proven(made: Merged) -> Merged:
    merge_phase.run(made.run, made.request, made.emit)
    assert proof_phase.run(made.run, made.request, made.emit)["passed"] is True
    return made


@pytest.fixture(scope="module")
def demo(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merged]:
    top = tmp_path_factory.mktemp("demo")
    yield merged_and_proven(prepare("demo", top, base_model, "smollm"))
    shutil.rmtree(top)  # over a gigabyte


@pytest.fixture(scope="module")
def tiny(r1_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merged]:
    top = tmp_path_factory.mktemp("tiny")
    yield merged_and_proven(prepare("tiny", top, r1_model, "deepseekr1", enable_thinking=False))
    shutil.rmtree(top)


@pytest.fixture(scope="module", params=["demo", "tiny"])
def model(request: pytest.FixtureRequest) -> Merged:
    value: Merged = request.getfixturevalue(request.param)
    return value


def test_a_right_merge_passes_every_check(model: Merged) -> None:
    checks = {check["name"]: check["passed"] for check in model.read("proof.json")["checks"]}
    assert len(checks) == 10
    assert set(checks.values()) == {True}
    with model.altered():
        assert model.failed() == []


def test_a_base_of_a_wider_dtype_is_proven(tiny: Merged) -> None:
    """Its weights are rounded when it is loaded, and once more when merged."""
    wide = tiny.run.parent / "wide"
    shutil.copytree(tiny.base, wide)
    old = load_file(tiny.base / "model.safetensors")
    save_file({n: t.float() * (1 + 2**-10) for n, t in old.items()}, wide / "model.safetensors")
    again = tiny.beside("again", model_name_or_path=str(wide))
    merge_phase.run(again.run, again.request, again.emit)
    assert proof_phase.run(again.run, again.request, again.emit)["passed"] is True


def scaled_by_zero(model: Merged) -> None:
    unmerge(model, *model.facts.targets.values())


def one_module_missed(model: Merged) -> None:
    unmerge(model, model.target)


def unmerge(model: Merged, *names: str) -> None:
    """Put the base model's tensors of these names into the merged model."""
    old, new = load_file(model.base / "model.safetensors"), load_file(model.weights)
    changed = {n: old[n].to(t.dtype) if n in names else t for n, t in new.items()}
    save_file(changed, model.weights, metadata={"format": "pt"})


def chat_template_altered(model: Merged) -> None:
    file = model.merged / "chat_template.jinja"
    file.write_text(file.read_text().replace("content", "content + ' '", 3))


def eos_changed(model: Merged) -> None:
    file = model.merged / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 3}))


def one_bit_of_a_target(model: Merged) -> None:
    flip(model.weights, model.target)


def one_bit_of_a_norm(model: Merged) -> None:
    flip(model.weights, model.norm)


def flip(weights: Path, name: str) -> None:
    """Turn over the lowest bit of a tensor's first element."""
    data = bytearray(weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[name]["data_offsets"][0]] ^= 1
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (scaled_by_zero, "recomputed"),
        (one_module_missed, "recomputed"),
        (chat_template_altered, "parity"),
        (eos_changed, "parity"),
        (one_bit_of_a_target, "recomputed"),
        (one_bit_of_a_norm, "untouched"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_is_found(
    model: Merged, plant: Callable[[Merged], None], check: str
) -> None:
    with model.altered():
        plant(model)
        failed = model.failed()
    assert check in failed
    assert "files" not in failed


def test_another_base_is_found(model: Merged, tmp_path: Path) -> None:
    other = tmp_path / "other base"
    shutil.copytree(model.base, other)
    old = load_file(model.base / "model.safetensors")
    changed = (model.norm, model.target)
    save_file(
        {n: t * 1.01 if n in changed else t for n, t in old.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    failed = model.failed(other)
    shutil.rmtree(other)
    assert {"untouched", "recomputed"} & set(failed)
    assert "files" not in failed


def test_any_bit_is_found_by_the_hashes(model: Merged) -> None:
    with model.altered():
        flip(model.weights, model.norm)
        check, _ = file_check(model.merged)
    assert check.passed is False
    assert check.detail.startswith("model.safetensors: sha256")


def test_another_eos_of_the_tokenizer_is_found_and_not_exported(model: Merged) -> None:
    codec = model.codec
    eos, other = codec.tokenizer.eos_token, codec.tokenizer.convert_ids_to_tokens(5)
    file = model.merged / "tokenizer_config.json"
    with model.altered():
        text = file.read_text(encoding="utf-8")
        right, wrong = (json.dumps(token, ensure_ascii=False) for token in (eos, other))
        file.write_text(text.replace(right, wrong), encoding="utf-8")
        faults = parity.check(model.config, codec, model.merged).faults()
        with pytest.raises(UsageError) as refused:
            export.run(model.run, "gguf")
    assert any(fault.startswith("tokenizer_config.json: eos_token") for fault in faults)
    # Its seal is compared first, where there is one; then what was proven.
    said = refused.value.message
    assert "not the model that was proven" in said or "changed since it was made" in said


def test_plain_transformers_answers_as_chat_does(
    model: Merged, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.merged)
    plain = AutoModelForCausalLM.from_pretrained(model.merged).eval()
    for text in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
        )
        answer = plain.generate(
            ids, do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids)
        )[0, ids.shape[1] :]
        expected = tokenizer.decode(answer, skip_special_tokens=True)
        capsys.readouterr()
        words = ["--run", str(model.run), "--what", "merged", "--greedy", "--prompt", text]
        assert chat.main([*words, "--max-new-tokens", "12"]) == 0
        said = capsys.readouterr().out.removesuffix("\n")
        assert said
        # The token limit may cut inside a character; chat leaves its first bytes out.
        assert expected.rstrip("\ufffd") == said


def test_the_manifest_names_every_file_and_what_it_was_made_of(model: Merged) -> None:
    written = model.read("merged/MANIFEST.json")
    assert written["files"] == model.read("proof.json")["files"]
    assert {"model.safetensors", "config.json", "Modelfile"} <= set(written["files"])
    assert written["lora"] == {"rank": 4, "alpha": 8.0, "scale": 2.0}
    assert len(written["adapters"][0]["sha256"]) == 64
    assert set(written["proof"].values()) == {True}


def corrected(model: Merged) -> list[str]:
    return [event["what"] for event in model.events if event["event"] == "changed"]


def test_exports_that_would_ask_otherwise_are_corrected(demo: Merged, tiny: Merged) -> None:
    # SmolLM2's own template adds a system text nobody trained with.
    assert corrected(demo) == ["chat_template.jinja"]
    assert "named SmolLM" in demo.read("parity.json")["before"][0]
    # DeepSeek's own opens a thought, LLaMA-Factory's Modelfile gives a second BOS and no thought.
    assert corrected(tiny) == ["chat_template.jinja", "Modelfile"]
    found = tiny.read("parity.json")
    assert found["prompt"].endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert found["passed"] is True
    (modelfile,) = (c for c in found["corrected"] if c["file"] == "Modelfile")
    assert "<｜begin▁of▁sentence｜>" in modelfile["was"]
    assert "<｜begin▁of▁sentence｜>" not in modelfile["now"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_every_kind_can_be_corrected(tiny: Merged, name: str, tmp_path: Path) -> None:
    varied = {k: v for k, v in tiny.config.items() if k != "enable_thinking"} | {"template": name}
    its = engine.codec(engine.base_arguments(varied))
    for file in ("config.json", "generation_config.json"):
        shutil.copy(tiny.base / file, tmp_path / file)
    its.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "Modelfile").write_text(its.template.get_ollama_modelfile(its.tokenizer))
    assert not parity.faults_of(parity.align(varied, its, tmp_path))


def test_a_prompt_that_cannot_be_corrected_stops_the_merge_unless_accepted(tiny: Merged) -> None:
    """A thinking mode that 0.9.3 asks otherwise than it trains; accepted, it is never "passed"."""
    run = tiny.beside("gate", dataset="thoughts", enable_thinking=None)
    with pytest.raises(TunesmithError) as refused:
        merge_phase.run(run.run, run.request, run.emit)
    said = f"{refused.value.message} {refused.value.hint}"
    assert "chat differs from training" in said
    assert "enable_thinking: null" in said
    assert "--accept-mismatch" in said
    assert not run.merged.exists()
    assert (run.run / "parity.json").is_file()
    accepted = dataclasses.replace(run.request, merge={"accept_mismatch": True})
    assert merge_phase.run(run.run, accepted, run.emit)["parity"] is False
    assert proof_phase.run(run.run, accepted, run.emit)["skipped"] == ["parity"]


Said = tuple[int, str, str]


def exported(model: Merged, *words: str) -> Said:
    """Export as `inv export` does; return exit code, output and errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = export.main(["--run", str(model.run), *words])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def for_ollama(model: Merged) -> Said:
    """What the export for Ollama says; it makes a GGUF where Ollama cannot read the folder."""
    return exported(model, "--format", "ollama")


@pytest.fixture(scope="module")
def as_gguf(model: Merged, for_ollama: Said) -> Said:
    """What the export that made a GGUF says."""
    made_one = "gguf:" in for_ollama[1]
    return for_ollama if made_one else exported(model, "--format", "gguf")


def test_a_gguf_holds_the_merged_model(model: Merged, as_gguf: Said) -> None:
    code, said, error = as_gguf
    assert code == 0, error
    assert "bf16, by gguf" in said
    code, _, error = exported(model, "--format", "gguf", "--quantise", "q8_0")
    assert code == 0, error
    exports = model.read("export.json")
    exact, coarse = exports.get("gguf bf16") or exports["ollama bf16"], exports["gguf q8_0"]
    assert exact["figures"]["max_difference"] == 0.0
    assert exact["logits"]["max"] < 0.02
    assert 0 < coarse["logits"]["kl"] < 0.05
    assert coarse["bytes"] < 0.7 * exact["bytes"]


@pytest.mark.usefixtures("as_gguf")
def test_a_damaged_gguf_is_found(model: Merged, tmp_path: Path) -> None:
    right = next((model.run / "export").glob("*.gguf"))
    damaged = tmp_path / right.name
    data = bytearray(right.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(TunesmithError, match="is off by"):
        gguf_writer.check(model.merged, damaged)
    damaged.unlink()


def test_what_cannot_be_exported_is_said(model: Merged) -> None:
    code, _, error = exported(model, "--format", "gguf", "--quantise", "q4_k_m")
    assert code == 2
    assert "needs llama-quantize" in error


def test_ollama_gets_what_it_can_read(model: Merged, for_ollama: Said) -> None:
    code, said, error = for_ollama
    assert code == 0, error
    # Ollama would split SmolLM2's numbers in threes.
    assert {
        "tiny": "FROM the folder",
        "demo": "does not support how this tokenizer splits text",
    }[model.kind] in said


def test_vllm_check_says_what_it_did_not_ask(model: Merged) -> None:
    code, said, error = exported(model, "--format", "vllm-check")
    assert code == 0, error
    assert "passed: the chat template gives the trained ids" in said
    assert "not checked: whether vLLM serves" in said
    assert "not checked: a running server" in said


@contextlib.contextmanager
def server(tokenizer: Any, before: list[int]) -> Iterator[str]:
    """Stands in for a vLLM server: its /v1/models and /tokenize, ids as the tokenizer has them.

    `before` are ids that it puts before those. Gives its address.
    """

    class StandIn(http.server.BaseHTTPRequestHandler):
        def answer(self, value: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "merged"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=body["add_generation_prompt"]
            )
            self.answer({"tokens": before + ids})

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), StandIn) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_a_running_server_is_asked_for_its_ids(model: Merged) -> None:
    words = ("--format", "vllm-check", "--server")
    tokenizer = AutoTokenizer.from_pretrained(model.merged)
    with server(tokenizer, before=[]) as address:
        code, said, error = exported(model, *words, address)
    assert code == 0, error
    assert "gives the trained ids on 5 prompts" in said
    with server(tokenizer, before=[1]) as address:
        code, _, error = exported(model, *words, address)
    assert code == 1
    assert "server differs from training in 'one question'" in error
    code, _, error = exported(model, *words, address)
    assert code == 1
    assert "no vLLM server answered" in error
