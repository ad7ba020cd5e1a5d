"""Compute with HF checkpoints under any version of transformers that has their class.

    python hf_answers.py OUT FOLDER...

Each folder has `inputs.safetensors` for the model and `messages.json` for its processor. OUT becomes an object: folder
-> logits of the last token of the inputs, and the ids generated after the messages.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

NUM_NEW_TOKENS = 16


def answer(folder: Path) -> dict[str, list]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    messages = json.loads((folder / "messages.json").read_text())
    inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**load_file(folder / "inputs.safetensors")).logits[0, -1]
        output = model.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    return {"logits": logits.tolist(), "ids": output[0, inputs["input_ids"].shape[1] :].tolist()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({folder: answer(Path(folder)) for folder in sys.argv[2:]}))
