"""Render messages with saved tokenizers under any version of transformers.

    python render_chat_template.py OUT FOLDER...

A name of a folder that ends in "slow" asks for the slow class. OUT becomes an object: folder -> [text, ids].
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is {{ this }}?"}]},
    {"role": "assistant", "content": " A cat."},
    {"role": "user", "content": "Really?"},
]


def render(folder: str) -> tuple[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=not folder.endswith("slow"))
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True)
    return text, list(getattr(ids, "input_ids", ids))  # a BatchEncoding in transformers 5


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({folder: render(folder) for folder in sys.argv[2:]}))
