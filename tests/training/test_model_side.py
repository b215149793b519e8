"""Evaluation, chat, merge and proof with a real model, and faults the proof must find.

An adapter with random weights stands in for a trained one: what is proven here does not
depend on how it came about.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.core.errors import TunesmithError, UsageError
from tunesmith.job.evaluation import phase as evaluation_phase
from tunesmith.job.inference import engine, validation_rows
from tunesmith.job.inference.engine import Codec
from tunesmith.job.merge import phase as merge_phase
from tunesmith.job.merge.adapter import AdapterFacts, check_fits
from tunesmith.job.proof import phase as proof_phase
from tunesmith.job.proof.behaviour import tokenizer_check
from tunesmith.job.proof.weights import file_check, weight_checks
from tunesmith.job.run import config as run_config
from tunesmith.job.run.failures import JobError
from tunesmith.job.run.folder import RunFolder
from tunesmith.job.run.schema import RunRequest

TARGETS = ["q_proj", "v_proj"]
TARGET, NORM = "model.layers.7.self_attn.q_proj.weight", "model.layers.7.input_layernorm.weight"
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Who are you?", "expect": "(?s).", "reference": None, "system": None},
    {"prompt": "你好", "expect": "^never this$", "reference": "你好！", "system": "Be brief."},
]
CHECKS = (
    *("files", "structure", "untouched", "recomputed", "effect"),
    *("tokenizer", "parity", "logits_unrounded", "logits", "answers"),
)


@dataclass
class Tuned:
    """A run folder with an adapter, measured before and after it.

    `rows` are the validation rows as LLaMA-Factory prepares them; `reckoned` the mean loss over
    their trained tokens and the number of these, by an independent way.
    """

    run: Path
    config: dict[str, Any]
    request: RunRequest
    rows: list[dict[str, Any]]
    row_texts: list[str]
    reckoned: dict[str, tuple[float, int]]
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def emit(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    @property
    def base(self) -> Path:
        return Path(self.config["model_name_or_path"])

    def answers(self, phase: str, kind: str) -> list[dict[str, Any]]:
        """The answers that a phase wrote, to the prompts or to rows held out."""
        lines = (self.run / f"{phase}.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["set"] == kind]


def reckon(model: Any, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """Mean loss over the trained tokens, row by row."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            kept = labels != -100
            logits = model(input_ids=ids).logits[0, :-1][kept]
            total += float(torch.nn.functional.cross_entropy(logits, labels[kept], reduction="sum"))
            count += int(kept.sum())
    return total / count, count


def write_run(top: Path, base_model: Path) -> Path:
    """Make a run folder whose path has a space, with 20 rows of data."""
    rows = [
        {"instruction": f"Question {n}?\nIn two lines.", "input": "", "output": f"答案 {n * 37}。"}
        for n in range(20)
    ]
    rows[3]["output"] = ""
    (top / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {"rows": {"file_name": "rows.json", "columns": columns}}
    (top / "dataset_info.json").write_text(json.dumps(info))
    run = top / "run"
    run.mkdir()
    config = {
        "model_name_or_path": str(base_model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": ",".join(TARGETS),
        "dataset": "rows",
        "dataset_dir": str(top),
        "template": "smollm",
        "cutoff_len": 128,
        "val_size": 6,
        "preprocessing_num_workers": 2,
        "overwrite_cache": True,
        "output_dir": str(run / "output"),
        "learning_rate": 1.0e-3,
        "report_to": "none",
        "seed": 7,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    request = {
        "prompts": PROMPTS,
        "evaluate": {"max_new_tokens": 8, "held_out_answers": 4, "batch_size": 4},
        "merge": {"template": "smollm", "infer_dtype": "bfloat16", "export_size": 5},
    }
    (run / "run.json").write_text(json.dumps(request, ensure_ascii=False), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def tuned(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    top = tmp_path_factory.mktemp("model side")
    run = write_run(top, base_model)
    config = run_config.read_config(run)
    # LLaMA-Factory's own way to its validation rows, argument checks and all.
    args = get_train_args(config)
    module = load_tokenizer(args[0])
    template = get_template_and_fix_tokenizer(module["tokenizer"], args[1])
    rows = list(get_dataset(template, *args[:3], stage="sft", **module)["eval_dataset"])

    plain = AutoModelForCausalLM.from_pretrained(base_model, torch_dtype=torch.float32).eval()
    before = reckon(plain, rows)
    torch.manual_seed(0)
    options = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS)
    adapted = get_peft_model(plain, options)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    adapted.eval().save_pretrained(config["output_dir"])
    after = reckon(adapted, rows)
    made = Tuned(
        run,
        config,
        RunFolder(run).request(),
        rows,
        [module["tokenizer"].decode(row["input_ids"]) for row in rows],
        {"before": before, "after": after},
    )
    del plain, adapted
    for phase in ("before", "after"):
        made.measured[phase] = evaluation_phase.run(run, made.request, made.emit, phase=phase)
    yield made
    shutil.rmtree(top)  # gigabytes


@pytest.fixture(scope="module")
def codec(tuned: Tuned) -> Codec:
    """Of the model before the training."""
    return engine.codec(engine.base_arguments(tuned.config))


@pytest.mark.parametrize("phase", ["before", "after"])
def test_loss_is_the_mean_over_all_trained_tokens(tuned: Tuned, phase: str) -> None:
    loss, tokens = tuned.reckoned[phase]
    assert tuned.measured[phase]["tokens"] == tokens
    assert tuned.measured[phase]["loss"] == pytest.approx(loss, abs=1e-4)
    assert tuned.measured[phase]["rows"] == 6


def test_the_adapter_is_in_the_second_measurement(tuned: Tuned) -> None:
    assert abs(tuned.measured["after"]["loss"] - tuned.measured["before"]["loss"]) > 0.01


def test_held_out_answers_stand_beside_their_own_rows(tuned: Tuned) -> None:
    for phase in ("before", "after"):
        held = tuned.answers(phase, "held_out")
        assert len(held) == 4
        for record, text in zip(held, tuned.row_texts, strict=False):
            assert record["prompt"] in text
            assert record["reference"] in text
    assert len({text.split("Question ")[1].split("?")[0] for text in tuned.row_texts}) == 6


def test_prompts_are_held_against_their_patterns(tuned: Tuned) -> None:
    assert [record["met"] for record in tuned.answers("before", "prompts")] == [True, False]
    assert tuned.measured["before"]["expected"] == {"met": 1, "of": 2}
    both = json.loads((tuned.run / "evaluation.json").read_text())
    assert both["before"] == tuned.measured["before"]
    assert both["after"] == tuned.measured["after"]


def test_progress_reaches_its_total(tuned: Tuned) -> None:
    progress = [event for event in tuned.events if event["event"] == "progress"]
    for phase in ("before", "after"):
        for unit, total in (("rows", 6), ("answers", 6)):
            own = [e["done"] for e in progress if (e["phase"], e["unit"]) == (phase, unit)]
            assert own[-1] == total
            assert own == sorted(own)


def test_greedy_stays_greedy_and_sampling_follows_its_seed(tuned: Tuned, codec: Codec) -> None:
    """Whatever the model ships."""
    loaded = engine.load(codec)
    questions = [engine.Question.of(p.prompt, p.system) for p in tuned.request.prompts]

    def by_hand(question: engine.Question, count: int) -> str:
        """One token at a time, without cache or padding."""
        ids = codec.encode(question)
        new: list[int] = []
        with torch.inference_mode():
            while len(new) < count and not (new and new[-1] in codec.stop_ids()):
                new.append(int(loaded.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        return str(codec.tokenizer.decode(new, skip_special_tokens=True))

    # What makes transformers >= 4.50 sample in spite of do_sample=False.
    loaded.model.generation_config.update(
        do_sample=True, temperature=5.0, transformers_version="4.52.4"
    )
    sampling = engine.Sampling(max_new_tokens=12)
    expected = [by_hand(question, 12) for question in questions]
    assert [a.text for a in engine.generate(loaded, questions, sampling)] == expected
    pieces: list[str] = []
    answer = engine.stream(loaded, questions[1], sampling, pieces.append)
    assert ["".join(pieces), answer.text] == [expected[1]] * 2
    first, again, other = (
        engine.generate(
            loaded,
            questions[:1],
            dataclasses.replace(sampling, do_sample=True, temperature=1.5, seed=seed),
        )[0].text
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_full_tuning_answers_with_the_output_itself(tuned: Tuned) -> None:
    output = tuned.run / "output"
    full = engine.tuned_arguments(tuned.config | {"finetuning_type": "full"}, output)
    lora = engine.tuned_arguments(tuned.config, output)
    assert (full["model_name_or_path"], full.get("adapter_name_or_path")) == (str(output), None)
    assert lora["model_name_or_path"] == str(tuned.base)
    assert lora["adapter_name_or_path"] == str(output)
    assert full["trust_remote_code"] is False


def with_template(tuned: Tuned, template: str, thinking: bool | None) -> dict[str, Any]:
    config = {k: v for k, v in tuned.config.items() if k != "enable_thinking"}
    chosen = {} if thinking is None else {"enable_thinking": thinking}
    return config | {"template": template} | chosen


@pytest.mark.parametrize(("template", "thinking"), [("smollm", None), ("deepseekr1", False)])
def test_the_model_is_asked_with_the_ids_it_was_trained_on(
    tuned: Tuned, template: str, thinking: bool | None
) -> None:
    """Also where a thinking mode puts a block between."""
    config = with_template(tuned, template, thinking)
    codec = engine.codec(engine.base_arguments(config))
    held = validation_rows.load_held_out(config, codec, 6)
    assert len(held.items) == 6
    for item, row in zip(held.items, held.rows, strict=True):
        prompt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
        assert codec.encode(item.question) == prompt


@pytest.mark.parametrize("thinking", [False, True])
def test_the_thinking_mode_decides_the_prompt(tuned: Tuned, thinking: bool) -> None:
    codec = engine.codec(engine.base_arguments(with_template(tuned, "deepseekr1", thinking)))
    prompt = codec.tokenizer.decode(codec.encode(engine.Question.of(PROMPTS[0]["prompt"], None)))
    assert prompt.endswith("<think>\n\n</think>\n\n") is not thinking
    assert ("<think>" in prompt) is not thinking


def test_no_pair_is_shown_where_it_might_be_wrong(tuned: Tuned, codec: Codec) -> None:
    def held(**change: Any) -> validation_rows.HeldOut:
        return validation_rows.load_held_out(tuned.config | change, codec, 6)

    packed = held(packing=True, val_size=0.5)
    assert packed.rows
    assert (packed.items, packed.no_loss) == ([], None)
    assert "packing" in str(packed.no_answers)
    nothing = held(val_size=0)
    assert (nothing.rows, nothing.items) == ([], [])
    assert "val_size" in str(nothing.no_loss)
    assert "stage dpo" in str(held(stage="dpo").no_loss)
    split = validation_rows._Split.load(tuned.config, codec)
    assert split.items(codec, list(reversed(split.rows())), 6) == (
        [],
        "a text and its tokenized validation row differ; no pair is shown",
    )
    items, reason = split.items(codec, split.rows()[:-1], 5)
    assert not items
    assert "counts differ" in str(reason)


def test_a_tokenizer_that_loses_text_is_a_data_failure(base_model: Path) -> None:
    broken = AutoTokenizer.from_pretrained(base_model)
    broken.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    validation_rows.check_round_trip(broken, ["one line"])
    with pytest.raises(JobError) as lost:
        validation_rows.check_round_trip(broken, ["two\nlines"])
    assert lost.value.failure == "data"
    assert "'two\\nlines'" in lost.value.message


@pytest.fixture(scope="module")
def merge_summary(tuned: Tuned) -> dict[str, Any]:
    """What the merge says, in place of an older one."""
    (tuned.run / "merged").mkdir()
    (tuned.run / "merged" / "old").write_text("of an earlier merge")
    (tuned.run / "proof.json").write_text("{}")
    return merge_phase.run(tuned.run, tuned.request, tuned.emit)


def test_merge_replaces_an_older_one_and_its_proof(
    tuned: Tuned, merge_summary: dict[str, Any]
) -> None:
    assert merge_summary["dtype"] == "bfloat16"
    assert merge_summary["targets"] == 30 * len(TARGETS)
    assert not (tuned.run / "merged" / "old").exists()
    assert not list(tuned.run.glob(".merged*"))


def chat(run: Path, *words: str, typed: str = "") -> str:
    """Chat by a process of its own, as a user does; return what it printed."""
    argv = [sys.executable, "-m", "tunesmith.job.evaluation.chat", "--run", str(run), "--greedy"]
    done = subprocess.run(
        [*argv, *words],
        # As loud as it is by itself.
        env={k: v for k, v in os.environ.items() if k != "LLAMAFACTORY_VERBOSITY"},
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_chat_prints_the_answer_and_nothing_else(tuned: Tuned) -> None:
    words = ("--max-new-tokens", "8", "--what", "adapter", "--prompt", "Who are you?")
    assert chat(tuned.run, *words) == tuned.answers("after", "prompts")[0]["answer"] + "\n"


@pytest.mark.usefixtures("merge_summary")
def test_a_conversation_remembers_until_cleared(tuned: Tuned) -> None:
    """With the merged model; the input ends without /exit."""
    typed = "Who are you?\nWho are you?\n/clear\nWho are you?\n"
    said = chat(tuned.run, "--what", "merged", "--max-new-tokens", "5", typed=typed)
    first, second, after_clear = said.removesuffix("\n").split("\n")
    assert first == after_clear
    assert second != first


class Merged:
    """The merged model of a run, and how its weights are altered."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.folder = tuned.run / "merged"
        self.weights = self.folder / "model.safetensors"
        self.right = self.weights.read_bytes()
        self.facts = check_fits(tuned.base, tuned.run / "output")
        self.old = load_file(tuned.base / "model.safetensors")
        self.new = load_file(self.weights)

    def overwrite(self, name: str, tensor: torch.Tensor) -> None:
        length = int.from_bytes(self.right[:8], "little")
        start, end = json.loads(self.right[8 : 8 + length])[name]["data_offsets"]
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert len(data) == end - start
        with self.weights.open("r+b") as stream:
            stream.seek(8 + length + start)
            stream.write(data)

    def unmerge(self) -> None:
        """Put the base model's tensors where the adapter changed them."""
        for name in self.facts.targets.values():
            self.overwrite(name, self.old[name])

    def failed(self, base: Path | None = None, facts: AdapterFacts | None = None) -> list[Any]:
        """The weight checks that fail."""
        checks = weight_checks(
            base or self.tuned.base, self.folder, facts or self.facts, "bfloat16"
        )
        return [check for check in checks if check.passed is False]


@pytest.fixture(scope="module")
def right(tuned: Tuned, merge_summary: dict[str, Any]) -> Merged:
    assert merge_summary
    return Merged(tuned)


@pytest.fixture
def merged(right: Merged) -> Iterator[Merged]:
    """To be altered; its weights are put back."""
    yield right
    right.weights.write_bytes(right.right)


def test_a_right_merge_is_proven(merged: Merged) -> None:
    run = merged.tuned.run
    assert proof_phase.run(run, merged.tuned.request, merged.tuned.emit)["passed"] is True
    proof = json.loads((run / "proof.json").read_text())
    assert proof["passed"] is True
    assert {c["name"]: c["passed"] for c in proof["checks"]} == dict.fromkeys(CHECKS, True)
    assert len(proof["files"]["model.safetensors"]["sha256"]) == 64
    assert merged.failed() == []


def one_element_outside_the_targets(merged: Merged) -> None:
    changed = merged.new[NORM].clone()
    changed[3] = -changed[3]
    merged.overwrite(NORM, changed)


def one_element_of_a_target_by_two_percent(merged: Merged) -> None:
    changed = merged.new[TARGET].clone()
    changed[5, 9] *= 1.02
    merged.overwrite(TARGET, changed)


def one_module_unmerged(merged: Merged) -> None:
    merged.overwrite(TARGET, merged.old[TARGET])


@pytest.mark.parametrize(
    ("plant", "checks", "detail"),
    [
        (one_element_outside_the_targets, ["untouched"], "layers.7.input_layernorm"),
        (one_element_of_a_target_by_two_percent, ["recomputed"], "layers.7.self_attn.q_proj"),
        (one_module_unmerged, ["recomputed"], "layers.7.self_attn.q_proj"),
        (Merged.unmerge, ["recomputed", "effect"], "60 tensors"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_faults_are_found_in_the_weights(
    merged: Merged, plant: Callable[[Merged], None], checks: list[str], detail: str
) -> None:
    plant(merged)
    failed = merged.failed()
    assert [check.name for check in failed] == checks
    assert detail in failed[0].detail


def test_an_adapter_of_zeros_is_found(merged: Merged, tmp_path: Path) -> None:
    """An adapter that does nothing, and its faithful merge."""
    zero = tmp_path / "zero adapter"
    shutil.copytree(merged.tuned.run / "output", zero)
    file = zero / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * (0 if "lora_B" in n else 1) for n, t in tensors.items()}, file)
    merged.unmerge()
    failed = merged.failed(facts=check_fits(merged.tuned.base, zero))
    assert [check.name for check in failed] == ["effect"]
    assert "the adapter has no effect" in failed[0].detail


def test_another_base_of_equal_shapes_is_found(merged: Merged, tmp_path: Path) -> None:
    other = tmp_path / "other base"
    shutil.copytree(merged.tuned.base, other)
    changed = (NORM, TARGET)
    save_file(
        {n: t * (1.01 if n in changed else 1) for n, t in merged.old.items()},
        other / "model.safetensors",
    )
    failed = merged.failed(base=other)
    shutil.rmtree(other)
    assert [check.name for check in failed] == ["untouched", "recomputed"]
    assert "layers.7.input_layernorm" in failed[0].detail


def test_what_cannot_be_recomputed_is_skipped_and_must_still_have_changed(merged: Merged) -> None:
    beyond = dataclasses.replace(merged.facts, beyond_plain=("use_dora",))

    def verdicts() -> dict[str, bool | None]:
        checks = weight_checks(merged.tuned.base, merged.folder, beyond, "bfloat16")
        return {check.name: check.passed for check in checks}

    right = {"structure": True, "untouched": True, "recomputed": None, "effect": True}
    assert verdicts() == right
    merged.unmerge()
    assert verdicts() == right | {"effect": False}


def test_an_export_without_the_adapter_is_no_merge(merged: Merged) -> None:
    merged.unmerge()
    with pytest.raises(TunesmithError, match="equals the base model in all 60 target tensors"):
        merge_phase.check_complete(merged.folder, merged.tuned.base, merged.facts, "bfloat16")


def test_damaged_files_of_the_merged_model_are_found(merged: Merged) -> None:
    merged.weights.write_bytes(merged.right[:-1000])
    check, _ = file_check(merged.folder)
    assert check.passed is False
    assert "model.safetensors" in check.detail


def test_a_damaged_tokenizer_is_found(merged: Merged) -> None:
    questions = [(engine.Question.of("two\nlines"), "")]
    assert tokenizer_check(merged.tuned.base, merged.folder, questions).passed is True
    file = merged.folder / "tokenizer.json"
    text = file.read_text()
    normalizer = {"type": "Replace", "pattern": {"String": "\n"}, "content": ""}
    file.write_text(json.dumps(json.loads(text) | {"normalizer": normalizer}))
    assert tokenizer_check(merged.tuned.base, merged.folder, questions).passed is False
    file.write_text(text)


def test_right_weights_in_another_model_are_refused(merged: Merged) -> None:
    """All tensors are right, and still it is another model."""
    run, request = merged.tuned.run, merged.tuned.request
    file = merged.folder / "config.json"
    config = file.read_text()
    file.write_text(json.dumps(json.loads(config) | {"rope_theta": 20000.0}))
    with pytest.raises(TunesmithError) as refused:
        proof_phase.run(run, request, merged.tuned.emit)
    assert refused.value.exit_code == 1
    assert "merged model refused: files: config.json: " in refused.value.message
    proof = json.loads((run / "proof.json").read_text())
    # The hash says that something was changed, the logits what it does.
    assert "logits_unrounded" in {c["name"] for c in proof["checks"] if c["passed"] is False}
    assert proof["passed"] is False
    assert sorted(f.name for f in run.iterdir() if f.name.startswith("merged")) == [
        "merged.refused"
    ]
    with pytest.raises(UsageError, match="no merged model"):
        proof_phase.run(run, request, merged.tuned.emit)
    (run / "merged.refused").rename(merged.folder)
    file.write_text(config)
