"""Answer with chat checkpoints by stock transformers and the code files in their folders.

    python remote_code_answers.py CASES OUT

CASES is a JSON object: name -> folder, auto class, options of `from_pretrained`. Each folder has `inputs.safetensors`.
OUT becomes an object: name -> answers. This package must not be importable.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

NUM_NEW_TOKENS = 12


def load_and_answer(folder: str, auto_class: str, options: dict) -> dict:
    """Load a model by an auto class of transformers, and answer."""
    options = {key: getattr(torch, value) if key == "torch_dtype" else value for key, value in options.items()}
    model, info = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    return {"problems": problems, **answer(model.eval(), tokenizer, load_file(Path(folder, "inputs.safetensors")))}


def answer(model, tokenizer, inputs: dict[str, torch.Tensor]) -> dict:
    """Compute logits, greedy tokens, and answers to a question with two images and to one that follows."""
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1].float()
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    tokens = model.generate(**inputs, **options, pad_token_id=0)
    images = {"pixel_values": inputs["pixel_values"], "num_patches_list": [1, 1], "generation_config": options}
    first, history = model.chat(tokenizer, question="Which is larger?", **images, return_history=True)
    second = model.chat(tokenizer, question="Why?", history=history, **images)
    return {"logits": logits.tolist(), "tokens": tokens.tolist(), "answers": [first, second]}


def extract_features(folder: str) -> list:
    """Compute visual tokens as lmdeploy does: without an LLM, with weights that accelerate loads."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = transformers.AutoModel.from_config(config, trust_remote_code=True)
        del model.language_model
    load_checkpoint_and_dispatch(
        model, folder, device_map={"": "cpu"}, no_split_module_classes=["InternVisionEncoderLayer"], dtype=torch.float32
    )
    with torch.no_grad():
        return model.extract_feature(load_file(Path(folder, "inputs.safetensors"))["pixel_values"]).tolist()


def main(cases_file: str, out_file: str) -> None:
    assert importlib.util.find_spec("internvl") is None, "the code files must do without the package"
    cases = json.loads(Path(cases_file).read_text())
    results = {}
    for name, case in cases.items():
        if case["auto_class"] == "from_config":
            results[name] = {"features": extract_features(case["folder"])}
        else:
            results[name] = load_and_answer(**case)
    Path(out_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
