"""What needs no model of prompt parity: Modelfiles, their templates, manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.errors import TunesmithError
from tunesmith.job.merge import manifest
from tunesmith.job.prompts import parity, templates
from tunesmith.job.prompts.go_template import render

pytestmark = pytest.mark.unit

ORIGIN = manifest.Origin(
    run="r",
    base=manifest.BaseOrigin("m/x", None, {}),
    adapters=(),
    lora=manifest.LoraOrigin(8, 16, 2.0),
    dtype="bfloat16",
    arithmetic="numpy",
    parity=True,
    corrected=(),
)
ASKED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
LLAMA_FACTORY = (
    "<s>{{ if .System }}[{{ .System }}]{{ end }}{{ range .Messages }}"
    '{{ if eq .Role "user" }}U:{{ .Content }}A:{{ else if eq .Role "assistant" }}{{ .Content }}.'
    "{{ end }}{{ end }}"
)


def test_llama_factorys_form_is_rendered() -> None:
    assert render(LLAMA_FACTORY, "", ASKED) == "<s>U:aA:b.U:cA:"
    # Ollama leaves the system text among the messages too; no branch takes it.
    assert render(LLAMA_FACTORY, "s", ASKED[:1]) == "<s>[s]U:aA:"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{- if .System }} x {{- end }} y", " y"),
        ("a \n{{- if not .System }}\n b {{ end -}}\n c", "a\n b c"),
        ("{{ range .Messages }}{{ .Role }}{{ end }}", "userassistantuser"),
        ("{{ if and .System .Messages }}1{{ else }}2{{ end }}", "2"),
        ("{{ if or .System (ne .System `x`) }}1{{ end }}", "1"),
        ('{{ if eq "a\\n" .System "a\\n" }}1{{ else if .Messages }}3{{ else }}2{{ end }}', "1"),
        ("{{ if .System }}{{ range .Messages }}{{ .Content }}{{ end }}{{ end }}-", "-"),
        ("{{/* a note */}}text", "text"),
        (
            '{{ $s := "S" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $s }}{{ .Content }}'
            '{{ $s = "" }}{{ end }}{{ end }}',
            "Sac",
        ),
    ],
)
def test_the_rest_of_the_language(template: str, expected: str) -> None:
    assert render(template, "", ASKED) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Tools }}",
        "{{ $unset }}",
        "{{ len .Messages }}",
        "{{ if .System }}",
        "{{ range .Messages }}",
        "{{ end }}",
        "{{ range .Messages }}{{ else }}{{ end }}",
        "{{ if eq .System }}{{ end }}",
        "{{ if (not .System }}{{ end }}",
        "{{ }}",
    ],
)
def test_what_is_not_known_is_refused_by_name(template: str) -> None:
    with pytest.raises(TunesmithError, match="Modelfile TEMPLATE"):
        render(template, "", ASKED)


def test_a_modelfile_is_read() -> None:
    text = 'FROM .\n\nTEMPLATE """a\n{{ .System }}"""\n\nSYSTEM """be brief"""\n\n'
    text += 'PARAMETER stop "<|im_end|>"\nPARAMETER stop </s>\nPARAMETER num_ctx 4096\n'
    assert templates.read_modelfile(text) == (
        "a\n{{ .System }}",
        "be brief",
        ["<|im_end|>", "</s>"],
    )
    assert templates.read_modelfile("FROM .\n") == ("", "", [])


def test_a_verdict_names_way_prompt_place_and_both_texts() -> None:
    difference = parity.Difference("modelfile", "one question", 3, "<think>", "")
    verdict = parity.Verdict(1, 0, 9, "p", "</s>", (difference,), ("no end",), ())
    assert verdict.passed is False
    assert verdict.faults() == [
        "modelfile differs from training in 'one question' at id 3: '' instead of '<think>'",
        "no end",
    ]
    again = json.loads(json.dumps(verdict.record()))
    assert parity.faults_of(again) == verdict.faults()


@pytest.mark.parametrize("lost", ["differences", "ends"])
def test_either_kind_of_fault_fails(lost: str) -> None:
    difference = parity.Difference("chat", "x", 0, "a", "b")
    values = {"differences": (), "ends": ()} | {lost: (difference if lost[0] == "d" else "x",)}
    assert parity.Verdict(1, 0, 1, "", "", **values, notes=()).passed is False  # type: ignore[arg-type]


def test_a_manifest_finds_changed_missing_and_added_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    written = manifest.write(tmp_path, ORIGIN)
    assert set(written) == {"a", "b", "c"}
    assert manifest.faults(tmp_path, manifest.listing(tmp_path)) == []
    manifest.note(tmp_path, "proof", {"files": True})
    assert manifest.faults(tmp_path, manifest.listing(tmp_path)) == []

    (tmp_path / "a").write_text("A")
    (tmp_path / "b").unlink()
    (tmp_path / "d").write_text("d")
    found = manifest.faults(tmp_path, manifest.listing(tmp_path))
    assert [line.split(":")[0] for line in found] == ["b", "d", "a"]
    assert "sha256" in found[2]
    (tmp_path / "MANIFEST.json").unlink()
    assert manifest.faults(tmp_path, {}) == ["MANIFEST.json: missing"]
