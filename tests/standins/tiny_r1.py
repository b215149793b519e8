"""A stand-in for DeepSeek-R1-Distill-Qwen: its configuration's shape, small and random.

Runs in the training environment. Same architecture, attention with biases, grouped heads, untied
head, special tokens and sampling defaults as the 1.5B model, and a chat template that behaves as
its own does (thoughts stripped from earlier answers, `<think>` opened for the next one); weights
are random and the vocabulary is learned from a few lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>")
PLAIN = ("<think>", "</think>")
# Qwen2's split expression (its tokenizer.json); llama.cpp and Ollama know it by its hash.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'system' %}{{ content }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + content }}"
    "{% else %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
LINES = [
    "What is 2 + 2? Be brief. Who are you? Hello, how are you? Only the number, please.",
    "你好！你是谁？简短回答。答案是四。水在零度结冰。",
    "Question 12345? In two lines. The answer stands in the first of them.",
]


def build(folder: Path, seed: int = 0) -> None:
    """Write the model folder."""
    import torch
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(token) for token in (BOS, EOS))
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + 26,  # the 1.5B has unused rows too
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=bos,
        eos_token_id=eos,
        torch_dtype="bfloat16",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.update(
        bos_token_id=bos, eos_token_id=eos, do_sample=True, temperature=0.6, top_p=0.95
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
