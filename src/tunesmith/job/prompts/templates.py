"""A chat template and an Ollama Modelfile that render the training prompt.

They are generated from the LLaMA-Factory template used in training. `thought` is the text that
training adds at the end of every prompt (the empty thinking block of a reasoning template, or
nothing); no template exported by 0.9.3 contains it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.documents import ModelConfig
from tunesmith.core.files import read_json, write_text

CHAT_TEMPLATE = "chat_template.jinja"
MODELFILE = "Modelfile"
_CONTEXT = 4096  # LLaMA-Factory's value; Ollama's own default may be smaller
# generation_config.json -> Modelfile
_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
}


def is_reasoning(template: Any) -> bool:
    """Return whether a LLaMA-Factory template has a thinking mode."""
    return type(template).__name__.startswith("Reasoning")


def is_read(template: Any) -> bool:
    """Return whether it was read from a model's chat template: a config named none."""
    from llamafactory.data.template import TEMPLATES

    return not any(template is one for one in TEMPLATES.values())


def chat_template(codec: Any, thought: str) -> str:
    """Return a Jinja chat template for transformers and vLLM."""
    template, tokenizer = codec.template, codec.tokenizer
    if _merges_system(template):
        return str(template._get_jinja_template(tokenizer))

    def text(part: Any, name: str) -> str:
        return _joined(part.slots, tokenizer, json_text, name, " + ") or '""'

    # LLaMA-Factory's chat strips thoughts from earlier answers (ReasoningTemplate.encode_oneturn).
    close = json_text(template.thought_words[1])
    strip = (
        f"{{%- if {close} in content %}}"
        f'{{%- set content = content.split({close})[-1].lstrip("\\n") %}}'
        "{%- endif %}\n"
    )
    default = json_text(template.default_system)
    # By an empty system text LLaMA-Factory tells a default one when it reads the template again.
    given = ' or messages[0]["role"] == "system"' if is_read(template) else ""
    shown = f"system_message{given}"
    return (
        '{%- if messages[0]["role"] == "system" %}'
        '{%- set system_message = messages[0]["content"] %}'
        "{%- set loop_messages = messages[1:] %}"
        f"{{%- else %}}{{%- set system_message = {default} %}}"
        "{%- set loop_messages = messages %}{%- endif %}\n"
        f"{{{{- {text(template.format_prefix, '')} }}}}\n"
        f"{{%- if {shown} %}}{{{{- {text(template.format_system, 'system_message')} }}}}"
        "{%- endif %}\n"
        '{%- for message in loop_messages %}{%- set content = message["content"] %}\n'
        f'{{%- if message["role"] == "user" %}}{{{{- {text(template.format_user, "content")} }}}}\n'
        '{%- elif message["role"] == "assistant" %}\n'
        f"{strip if is_reasoning(template) else ''}"
        f"{{{{- {text(template.format_assistant, 'content')} }}}}\n"
        '{%- else %}{{- raise_exception("role " + message["role"] + " was not trained") }}'
        "{%- endif %}\n"
        "{%- endfor %}"
        + (
            f"\n{{%- if add_generation_prompt %}}{{{{- {json_text(thought)} }}}}{{%- endif %}}"
            * bool(thought)
        )
    )


def modelfile(codec: Any, folder: Path, thought: str, source: str = ".") -> str:
    """Return a Modelfile for the model in `folder`; `source` is the value of FROM."""
    template, tokenizer = codec.template, codec.tokenizer
    shipped = _read(folder / "generation_config.json")
    context = int(_read(folder / "config.json").get("max_position_embeddings") or _CONTEXT)
    body = _ollama_template(codec)
    if adds_bos(folder) and tokenizer.bos_token:
        # Ollama adds it itself; a second one would change the prompt.
        body = body.removeprefix(tokenizer.bos_token)
    lines = ["# Made by tunesmith from the template the model was trained with.", f"FROM {source}"]
    lines.append(f'TEMPLATE """{body}{thought}"""')
    if template.default_system:
        lines.append(f'SYSTEM """{template.default_system}"""')
    for token in codec.stop_ids():
        lines.append(f"PARAMETER stop {json_text(tokenizer.convert_ids_to_tokens(token))}")
    for key, name in _PARAMETERS.items():
        if shipped.get(key) is not None:
            lines.append(f"PARAMETER {name} {shipped[key]}")
    lines.append(f"PARAMETER num_ctx {min(context, _CONTEXT)}")
    return "\n".join(lines) + "\n"


def _ollama_template(codec: Any) -> str:
    template, tokenizer = codec.template, codec.tokenizer

    def text(part: Any, name: str) -> str:
        return _joined(part.slots, tokenizer, str, f"{{{{ {name} }}}}", "")

    user, content = text(template.format_user, ".Content"), "{{ .Content }}"
    if _merges_system(template):
        # The system text is part of the first question, so it is stored until then.
        once = f"{{{{ if $system }}}}{text(template.format_system, '$system')}{{{{ end }}}}"
        head = "{{ $system := .System }}"
        user = user.replace(content, once + content) + '{{ $system = "" }}'
    else:
        head = f"{{{{ if .System }}}}{text(template.format_system, '.System')}{{{{ end }}}}"
    return (
        f"{text(template.format_prefix, '')}{head}"
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{text(template.format_assistant, ".Content")}'
        "{{ end }}{{ end }}"
    )


def adds_bos(folder: Path) -> bool:
    """Return whether Ollama and llama.cpp add a BOS to every prompt of this model.

    Ollama's import of a safetensors folder reads add_bos_token of tokenizer_config.json; our GGUF
    files contain the same value.
    """
    return _read(folder / "tokenizer_config.json").get("add_bos_token") is True


def put_add_bos(folder: Path, *, add: bool) -> None:
    """Set in tokenizer_config.json whether a BOS is added to every text."""
    file = folder / "tokenizer_config.json"
    config = {**read_json(file), "add_bos_token": add}
    write_text(file, json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def read_modelfile(text: str) -> tuple[str, str, list[str]]:
    """Return (TEMPLATE, SYSTEM, stop texts) of a Modelfile."""
    sections = {
        key: match[1]
        for key in ("TEMPLATE", "SYSTEM")
        if (match := re.search(rf'^{key} """(.*?)"""', text, re.DOTALL | re.MULTILINE))
    }
    stops = []
    for value in re.findall(r"^PARAMETER stop (.*)$", text, re.MULTILINE):
        stops.append(json.loads(value) if value.startswith('"') else value)
    return sections.get("TEMPLATE", ""), sections.get("SYSTEM", ""), stops


def put_chat_template(folder: Path, template: str) -> None:
    """Write the chat template as in transformers 4.52: to a separate file."""
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    if config.pop("chat_template", None) is not None:
        write_text(file, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    write_text(folder / CHAT_TEMPLATE, template)


def eos_ids(folder: Path) -> list[int]:
    """Return the ids that end generate(): of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            if value is not None:
                return [int(item) for item in (value if isinstance(value, list) else [value])]
    return []


def json_text(text: str) -> str:
    """Return `text` in double quotes, with escapes valid in Jinja and Modelfiles."""
    return json.dumps(text, ensure_ascii=False)


def _joined(
    slots: Any, tokenizer: Any, quote: Callable[[str], str], content: str, glue: str
) -> str:
    """Return a formatter's slots as one expression, with `content` in place of the text."""
    parts: list[str] = []
    for slot in slots:
        if isinstance(slot, Mapping):
            parts.append(quote(str(slot["token"])))
        elif isinstance(slot, (set, frozenset)):
            name = next(iter(slot))
            token = getattr(tokenizer, name)
            parts += [quote(token)] if token is not None else []
        else:
            for number, piece in enumerate(slot.split("{{content}}")):
                parts += [content] if number else []
                parts += [quote(piece)] if piece else []
    return glue.join(parts)


def _merges_system(template: Any) -> bool:
    """Return whether the template includes the system text in the first question (Llama 2).

    LLaMA-Factory's own conversion handles these.
    """
    from llamafactory.data.template import Template

    return type(template)._encode is not Template._encode


def _read(file: Path) -> ModelConfig:
    value: ModelConfig = read_json(file) if file.is_file() else {}
    return value
