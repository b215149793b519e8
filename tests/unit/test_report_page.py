"""The page: all there is in a run folder, and a name for all there is not."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.unit.run_folder import CONFIG, RUN_ID, SHA, answers, build_run
from tunesmith.core.errors import UsageError
from tunesmith.core.printable import CONTROLS
from tunesmith.job.run.codec import decode
from tunesmith.job.run.events import Event
from tunesmith.report import i18n, page, record, sections, timing
from tunesmith.report.curve import read_curve
from tunesmith.report.page import write_report

pytestmark = pytest.mark.unit


class Shown(HTMLParser):
    """The visible text, and what a browser would run or fetch."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self._hidden = 0
        self.feed(source)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden += tag in ("style", "svg")
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
                self.links.append((tag, value or ""))
            assert not name.startswith("on"), f"{tag} has a script in {name}"

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "svg")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path)


def shown(run: Path, language: str = "en") -> Shown:
    """The page of a run; the pictures, which take a second to draw, have their own tests."""
    found = record.read_record(run)
    pictures = ("<svg></svg>", "<svg></svg>")
    return Shown(page.render(found, read_curve(found.events), pictures, language))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


def test_writes_its_three_files_and_nothing_else(run: Path) -> None:
    before = {path.name for path in run.iterdir()}

    assert write_report(run) == run / "report.html"
    written = {path.name for path in run.iterdir()} - before
    assert written == {"report.html", "report.md", "training_loss.png"}


def test_markdown_holds_the_same_and_no_markup_of_others(run: Path) -> None:
    evil = "<b>|`x`*y*\nz"
    rows = [{**row, "answer": evil} for row in answers(tuned=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "after.jsonl").write_text(lines, encoding="utf-8")
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")

    assert "&lt;b>\\|\\`x\\`\\*y\\*<br>z" in text
    assert "<b>" not in text
    for part in ("3.41 → 1.69", "| loss (nat/token) | 2.1043 | 2.6904 |", "learning_rate", SHA):
        assert part in text
    # Every line of a table has the columns of its head.
    table = [line for line in text.splitlines() if line.startswith("| ") and "ROUGE" in line]
    assert table
    assert {line.count("|") for line in table} == {4}


def test_no_text_of_others_is_markup_of_the_markdown(run: Path) -> None:
    """Whatever a pulled run says of itself: a page of Markdown is opened by others, too."""
    evil = "x` ``` ![p](https://evil/p) |\r\n\r\n# y\n```\n<img src=x>\x1b[2J\u202e"
    request = json.loads((run / "run.json").read_text(encoding="utf-8"))
    request |= dict.fromkeys(("title", "created", "config_file"), evil)
    request["price"] = {"per_hour": 1, "currency": evil}
    request["overrides"] = {evil: evil}
    request["data"] = [{"key": evil, "file": evil, evil: evil}]
    request["model"] |= {"name": evil, "files": {evil: {"size": 1, "sha256": SHA}}}
    proof = json.loads((run / "proof.json").read_text(encoding="utf-8"))
    proof["checks"].append({"name": evil, "passed": True, "detail": evil})
    proof["files"] = {evil: {"size": 1, "sha256": SHA}}
    parity = json.loads((run / "parity.json").read_text(encoding="utf-8"))
    parity |= {"ends": [evil], "corrected": [{"file": evil}]}
    status = {"run_id": RUN_ID, "state": "failed", "failure": "code", "message": evil}
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ended = {"event": "phase_ended", "phase": evil, "state": evil, "seconds": 1}
    lines += [json.dumps({"time": 1783383005, **ended})]
    (run / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump({evil: evil}), encoding="utf-8")
    for name, value in (
        *(("run.json", request), ("proof.json", proof), ("parity.json", parity)),
        *(("status.json", status), ("versions.json", {evil: evil})),
    ):
        (run / name).write_text(json.dumps(value), encoding="utf-8")
    for name in ("before.jsonl", "after.jsonl"):
        row = {"prompt": evil, "answer": evil, "set": evil, "expect": evil, "met": True}
        (run / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = record.read_record(run)
    text = page.markdown(found, read_curve(found.events))

    assert text.count("evil/p") > 20
    assert CONTROLS.search(text) is None
    assert CONTROLS.search(page.render(found, read_curve(found.events), ("", ""))) is None
    seen = Shown(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    assert seen.links == [("img", "training_loss.png")]
    assert [word for word in seen.words if word.strip() == "y"] == []


def test_a_loss_of_nothing_has_no_change_in_percent() -> None:
    assert [sections.percent(*of) for of in ((0.0, 1.0), (math.nan, 1.0), (1e-320, 1.0))] == [
        "–",
        "–",
        "–",
    ]
    assert sections.percent(2.0, 1.0) == "−50%"


def test_the_guard_set_has_its_own_place(run: Path) -> None:
    text = shown(run).text

    assert "Guard set 2.10 → 2.69 +28%, 2 → 1 of 2 right" in text
    assert "On general prompts its loss rose by 28%." in text
    assert "The model has forgotten" in text
    assert "right answers 2 / 2 1 / 2" in text
    # The user's own prompts are counted without it.
    assert "Prompts met 0 → 5 of 6" in text


def test_parity_shows_the_trained_prompt_and_what_was_corrected(run: Path) -> None:
    text = shown(run).text

    assert "against those of the training (5 prompts, 139 ids)" in text
    assert "chat template (transformers, vLLM) agrees" in text
    assert "Corrected in the export: chat_template.jinja" in text
    assert "You are SmolLM" in text
    parity = json.loads((run / "parity.json").read_text(encoding="utf-8"))
    parity |= {"passed": False, "accepted": True, "ends": ["generation_config.json: x"]}
    difference = {
        "renderer": "api",
        "probe": "row 1",
        "at": 3,
        "expected": "<think>",
        "found": "hm",
    }
    (run / "parity.json").write_text(json.dumps(parity | {"differences": [difference]}))
    text = shown(run).text
    assert "LLaMA-Factory's API differs row 1: 'hm' / '<think>' (id 3)" in text
    assert "end of answers differs generation_config.json: x" in text
    assert "Accepted by the user at the merge." in text


def test_cost_is_shown_where_a_price_is_known(run: Path) -> None:
    assert "Cost of these phases at 1.98 CNY an hour: 0.21 CNY." in shown(run).text
    request = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for price, said in ((2.5, "Cost of these phases at 2.5 an hour: 0.27."), (None, "")):
        (run / "run.json").write_text(json.dumps(request | {"price": price}), encoding="utf-8")
        text = shown(run).text
        assert said in text
        assert ("Cost of" in text) is bool(said)


def test_headline_says_how_it_went(run: Path) -> None:
    text = shown(run).text

    assert "The held-out loss fell by 50%, from 3.41 to 1.69." in text
    assert "The tuned model met 5 of 6 prompts, the base model 0." in text
    assert "The merged model is proven equal to base model and adapter." in text
    assert "State succeeded step 104 of 104" in text
    assert "Held-out loss 3.41 → 1.69 −50%, nat per token" in text
    assert "Prompts met 0 → 5 of 6" in text
    assert "Merge proof passed 4 of 4 checks" in text
    assert "Time 6 min 30 s of it training 4 min 20 s" in text


def test_every_part_of_the_run_is_there(run: Path) -> None:
    text = shown(run).text

    for row in [*answers(tuned=True), *answers(tuned=False)[:6]]:
        assert row["prompt"] in text
        assert row["answer"] in text
    assert "自由是在限制之中仍能选择自己的态度。" in text  # a reference
    assert "The curve is healthy" in text
    for key in CONFIG:
        assert key in text
    assert "true would delete the checkpoints a restart continues from" in text
    assert "data/philosophy_data.json" in text
    assert "train (2 attempts) 4 min 20 s 3.1 GB" in text
    assert "logits passed equal base + adapter on 6 prompts" in text
    assert "Tolerance: merged dtype bfloat16 · logits mean 0.001, kl 1e-06" in text
    assert "changed 210 · elements 83,338,532 · others none" in text
    assert "2.8.0+cu128" in text
    assert "Resumed at step 60 from checkpoint-60; 7 logged steps were done again." in text
    assert "Discarded checkpoint-66: model file is shorter than its index." in text
    assert (
        "inv train --config configs/train/smollm2_135m_lora_sft.yaml num_train_epochs=4.0" in text
    )


def test_hashes_are_short_with_the_whole_one_in_the_title(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")

    assert f'<code title="{SHA}">{SHA[:12]}…</code>' in source


def test_page_is_complete_in_itself(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    seen = Shown(source)

    assert "script" not in seen.tags
    assert {tag for tag, _ in seen.links} <= {"link", "use"}
    assert all(value == "data:," or value.startswith("#") for _, value in seen.links)
    assert not re.search(r"@import|url\((?!#)|<img|<iframe", source)
    assert "default-src 'none'" in source
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))


def test_answers_are_text_and_never_markup(run: Path) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'
    rows = [{**answers(tuned=True)[0], "answer": evil, "prompt": evil, "reference": evil}]
    (run / "after.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    change(run / "run.json", title=evil)
    seen = shown(run)

    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert seen.text.count(evil) >= 4  # title, heading, prompt, answer


@pytest.mark.parametrize("name", sorted(record.FILES))
def test_a_missing_file_is_named_with_its_command(run: Path, name: str) -> None:
    (run / name).unlink()
    text = shown(run).text

    assert f"{record.FILES[name][0]}: {name} is not there." in text
    assert "This page is not complete" in text
    expected = {
        "proof.json": f"inv merge --run {RUN_ID}",
        "status.json": f"inv resume --run {RUN_ID}",
    }
    assert expected.get(name, "inv train --config configs/train/smollm2") in text


def test_only_run_json_is_needed(run: Path) -> None:
    for name in record.FILES:
        (run / name).unlink()
    text = Shown(write_report(run).read_text(encoding="utf-8")).text

    assert "State unknown" in text
    assert f"inv resume --run {RUN_ID}" in text


@pytest.mark.parametrize("name", sorted(record.FILES))
def test_a_damaged_file_is_named_and_the_rest_is_shown(run: Path, name: str) -> None:
    (run / name).write_text("[[[\n{\n", encoding="utf-8")
    text = shown(run).text

    assert f"{name} damaged: " in text
    assert "Run it again" in text


def test_a_torn_last_line_is_no_damage(run: Path) -> None:
    with (run / "after.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "half a li')

    assert "damaged" not in shown(run).text


def test_no_run_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.json is missing"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_language_is_refused_and_nothing_written(run: Path) -> None:
    with pytest.raises(UsageError, match="report language 'xx' is unknown"):
        write_report(run, language="xx")
    assert not (run / "report.html").exists()


def test_a_run_without_a_merge_is_complete_without_proof(run: Path) -> None:
    change(run / "run.json", phases=["before", "train", "after"])
    (run / "proof.json").unlink()
    text = shown(run).text

    assert "This page is not complete" not in text
    assert f"proof.json was not part of this run). inv merge --run {RUN_ID}" in text
    assert "Merge and prove the result" in text


def test_a_failed_run_says_so_first(run: Path) -> None:
    fields = {"state": "failed", "failure": "nan", "message": "the loss became nan at step 12"}
    change(run / "status.json", **fields)
    text = shown(run).text

    assert "State failed nan" in text
    assert "The run failed (nan). the loss became nan at step 12" in text
    assert f"inv resume --run {RUN_ID}" in text


def test_a_refused_merge_warns_against_its_use(run: Path) -> None:
    check = {"name": "logits", "passed": False, "detail": "0.9 apart", "figures": {}}
    skipped = {"name": "recomputed", "passed": None, "detail": "quantized", "figures": {}}
    change(run / "proof.json", passed=False, checks=[check, skipped])
    text = shown(run).text

    assert "The merged model did not pass its proof: do not use it." in text
    assert "Merge proof failed 0 of 2 checks, 1 not possible" in text
    assert "logits failed 0.9 apart" in text
    assert "recomputed not possible quantized" in text


def test_keys_changed_by_the_run_are_marked(run: Path) -> None:
    event = {
        "event": "changed",
        "time": 1768383100.0,
        "what": "per_device_train_batch_size",
        "from": 4,
        "to": 2,
        "why": "GPU out of memory",
    }
    lines = (run / "events.jsonl").read_text(encoding="utf-8")
    (run / "events.jsonl").write_text(json.dumps(event) + "\n" + lines, encoding="utf-8")
    text = shown(run).text

    assert "4 changed 2: GPU out of memory" in text
    assert "Changed per_device_train_batch_size from 4 to 2: GPU out of memory." in text


def test_a_long_answer_is_folded_and_whole(run: Path) -> None:
    rows = answers(tuned=True)
    rows[0]["answer"] = "word " * 500 + "END"
    rows[1] |= {"answer": "a\n\n" * 40 + "END", "finished": False}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "after.jsonl").write_text(text, encoding="utf-8")
    seen = shown(run)

    assert seen.text.count("the rest of this answer") == 3  # these two and one of before
    assert seen.text.count("END") == 2
    assert seen.text.count("word") == 500
    assert seen.text.count("ended by the token limit") == 1


def test_config_shows_keys_the_run_took_away(run: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "overwrite_output_dir"}
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    assert "overwrite_output_dir false owned" in shown(run).text


def test_phase_times_survive_a_death_without_a_word() -> None:
    def event(name: str, time: float, **fields: Any) -> Event:
        return decode(Event, {"event": name, "time": time, "phases": [], **fields})

    times = timing.phase_times(
        (
            event("run_started", 0),
            event("phase_started", 0, phase="train", attempt=1),
            event("log", 30, step=1, loss=1.0),
            event("run_started", 9000),  # the machine was off
            event("phase_started", 9000, phase="train", attempt=1),
            event("phase_ended", 9020, phase="train", state="succeeded"),
            event("phase_started", 9020, phase="after", attempt=1),
            event("progress", 9025, phase="after", done=1, total=2, unit="rows"),
        )
    )

    assert [(t.phase, t.seconds, t.attempts, t.state) for t in times] == [
        ("train", 50.0, 2, "succeeded"),
        ("after", 5.0, 1, "running"),
    ]


def test_chinese_page(run: Path) -> None:
    source = write_report(run, language="zh").read_text(encoding="utf-8")
    text = Shown(source).text

    assert '<html lang="zh-CN">' in source
    assert "训练（平滑）" in source
    assert "留出集损失下降 50%，从 3.41 降到 1.69。" in text
    for phrase in ("Before and after", "Diagnosis", "The curve is healthy", "Parameters"):
        assert phrase not in text


def test_every_phrase_has_its_chinese() -> None:
    translate = i18n.translator("zh")
    folder = Path(page.__file__).parent
    said = set(re.findall(r"\bt\('([^']+)'\)", (folder / "report.html.j2").read_text("utf-8")))
    said |= set(re.findall(r"t\('([^']+)'\) if", (folder / "report.html.j2").read_text("utf-8")))
    for module in ("sections", "answers", "timing", "terminal", "picture"):
        source = (folder / f"{module}.py").read_text(encoding="utf-8")
        said |= set(re.findall(r"""\bt\(\s*["']([^"']+)["']""", source))
    said |= set(sections.NOTES.values()) | {*sections.GROUPS, "Other"}
    said |= {gives for gives, _ in record.FILES.values()}
    assert len(said) > 80

    assert sorted(phrase for phrase in said if translate(phrase) == phrase) == []
