"""Print, as JSON, how a job sees a model through LLaMA-Factory's template: model_as_seen.py MODEL.

TEXT is what it is asked and what it answers.
"""

from __future__ import annotations

import json
import sys

from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

TEXT = "Hi\n你好 🙂"


def main(folder: str) -> None:
    """Ask tokenizer, template and configs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(TEXT)
    chat = [{"role": "user", "content": TEXT}]
    own = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm"))
    messages = [*chat, {"role": "assistant", "content": TEXT}]
    prompt, answer = template.encode_oneturn(tokenizer, messages)
    seen = {
        "ids": ids,
        "digits": len(tokenizer.encode("2025")),
        "back": tokenizer.decode(ids),
        "own": own,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "stop": GenerationConfig.from_pretrained(folder).eos_token_id,
        "dtype": str(AutoConfig.from_pretrained(folder).torch_dtype),
        "prompt": tokenizer.decode(prompt),
        "answer": tokenizer.decode(answer),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
