"""Converted checkpoints compute the same under all versions of transformers that have their class.

One process of each version computes with all models. 4.52 was the first version with the class.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.tiny_models import TINY_LLM, TINY_LLMS, make_tiny_checkpoint
from helpers.token_recorder import TokenRecorder
from PIL import Image
from programs import hf_answers
from safetensors.torch import save_file

from internvl.data.images import build_transform, dynamic_preprocess
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.internvl_custom2hf import main as custom2hf

pytestmark = pytest.mark.multiprocess

# Models whose rotary embeddings are not those of version 4's defaults.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALED_LLMS = {
    "qwen2_theta": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6},
    "qwen2_yarn": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6, "rope_scaling": YARN},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 5e5,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
    },
}
PHI3 = TINY_LLMS["phi3_su"]
SCALED_LLMS["phi3_longrope"] = PHI3 | {"rope_scaling": {**PHI3["rope_scaling"], "type": "longrope"}}
LLMS = [*SCALED_LLMS, "qwen3", "qwen3_moe", "gpt_oss", "phi3_su", "internlm2_bias_linear", "internlm2_dynamic"]
MISSING_CLASSES = {"4.52.1": {"gpt_oss"}}
QUESTION, SIDE = "What is this?", 56


@pytest.fixture(scope="module")
def expected(goldens, tmp_path_factory) -> dict[Path, dict[str, list]]:
    """Convert all models; return their folders with the logits and ids of InternVLChatModel."""
    folder = tmp_path_factory.mktemp("hf")
    image = Image.effect_mandelbrot((2 * SIDE, SIDE), (-2, -1, 1, 1), 50).convert("RGB")
    image.save(folder / "image.png")
    pixel_values = torch.stack(
        [build_transform(False, SIDE)(tile) for tile in dynamic_preprocess(image, 1, 4, SIDE, True)]
    )
    content = [{"type": "image", "url": str(folder / "image.png")}, {"type": "text", "text": QUESTION}]
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_LLM, "eos_token_id", None)  # `chat` does not end there
        for name, fields in SCALED_LLMS.items():
            patch.setitem(TINY_LLMS, name, fields)
        for llm in LLMS:
            tokenizer_path = goldens / ("tokenizer_internlm2" if llm.startswith("internlm2") else "tokenizer")
            model = make_tiny_checkpoint(folder / f"{llm}_chat", tokenizer_path, llm=llm)
            custom2hf(["--custom_path", str(folder / f"{llm}_chat"), "--save_path", str(folder / llm)])
            tokenizer, recorder = load_tokenizer(tokenizer_path), TokenRecorder()
            options = {"max_new_tokens": hf_answers.NUM_NEW_TOKENS, "do_sample": False, "streamer": recorder}
            model.chat(tokenizer, pixel_values, QUESTION, options)
            text = f"Look: <img>{'<IMG_CONTEXT>' * model.num_image_token * len(pixel_values)}</img> what is it?"
            inputs = {"input_ids": tokenizer(text, return_tensors="pt").input_ids, "pixel_values": pixel_values}
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            save_file(inputs, folder / llm / "inputs.safetensors")
            (folder / llm / "messages.json").write_text(json.dumps([{"role": "user", "content": content}]))
            answers[folder / llm] = {"logits": logits.tolist(), "ids": recorder.tokens}
    return answers


@pytest.mark.parametrize("version", ["4.52.1", "4.57.6", None])
def test_logits_and_answers_equal_the_chat_models(version, expected, tmp_path):
    python = Path(sys.executable)
    if version:
        python = make_layer_or_skip(f"transformers-{version}", [f"transformers=={version}"])
    folders = [folder for folder in expected if folder.name not in MISSING_CLASSES.get(version, ())]
    command = [python, hf_answers.__file__, tmp_path / "out.json", *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=layer_environment(python))
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "out.json").read_text())
    for folder in folders:
        actual = answers[str(folder)]
        assert actual["ids"] == expected[folder]["ids"], folder.name
        logits = torch.tensor(actual["logits"]), torch.tensor(expected[folder]["logits"])
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4, msg=lambda text, name=folder.name: f"{name}: {text}")
