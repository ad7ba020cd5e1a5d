"""A converted checkpoint generates the same tokens as `InternVLChatModel.chat`."""

import json
import shutil

import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.token_recorder import TokenRecorder
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from internvl.data.images import build_transform, dynamic_preprocess
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.internvl_custom2hf import main as custom2hf

GREEDY = {"max_new_tokens": 64, "do_sample": False}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_processor_and_generate_equal_chat(kind, adapted, goldens, tmp_path):
    """Compare 64 tokens for two images, one image and a dialogue.

    Each image has several tiles. Templates and tokenizers are the goldens'. Adapters are merged by the conversion.
    """
    custom, hf = tmp_path / "custom", tmp_path / "hf"
    shutil.copytree(goldens / "e2e" / kind, custom, copy_function=shutil.copyfile)
    custom.chmod(0o755)
    tokenizer_name = json.loads((custom / "expected.json").read_text())["tokenizer"]
    for file in (goldens / tokenizer_name).iterdir():
        shutil.copyfile(file, custom / file.name)
    model = InternVLChatModel.from_pretrained(custom)
    if adapted:
        model.config.use_backbone_lora = model.config.use_llm_lora = 2
        model.wrap_backbone_lora(2, 4)
        model.wrap_llm_lora(2, 4)
        randomize_adapters(model, std=0.2)
        model.save_pretrained(custom)
    custom2hf(["--custom_path", str(custom), "--save_path", str(hf)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["custom", "hf"]

    model.eval()
    tokenizer, native = load_tokenizer(custom), AutoModelForImageTextToText.from_pretrained(hf).eval()
    processor = AutoProcessor.from_pretrained(hf)
    for line in (goldens / tokenizer_name / "encodings.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert processor.tokenizer(row["text"]).input_ids == row["ids"], row["text"]

    images = [Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((112, 56), (56, 168))]
    limits = 1, model.config.max_dynamic_patch, 56, model.config.use_thumbnail
    tiles = [dynamic_preprocess(image, *limits) for image in images]
    assert [len(image_tiles) for image_tiles in tiles] == [3, 4]
    first_turn = "What is this?", "A fractal."
    for num_images, question, earlier in (
        (2, "Which is larger?", None),
        (1, "What is this?", None),
        (1, "Really?", first_turn),
    ):
        shown_tiles = [tile for image_tiles in tiles[:num_images] for tile in image_tiles]
        pixel_values = torch.stack([build_transform(False, 56)(tile) for tile in shown_tiles])
        turns = [("user", question)]
        if earlier:
            turns = [("user", earlier[0]), ("assistant", earlier[1]), ("user", question)]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        messages[0]["content"][:0] = [{"type": "image", "image": image} for image in images[:num_images]]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        # torchvision resizes the processor's images, PIL ours.
        torch.testing.assert_close(inputs["pixel_values"], pixel_values, atol=0.05, rtol=0)
        with torch.no_grad():
            hf_tokens = native.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        recorder = TokenRecorder()
        history = earlier and [("<image>\n" + earlier[0], earlier[1])]
        num_tiles = [len(image_tiles) for image_tiles in tiles[:num_images]]
        settings = {**GREEDY, "streamer": recorder}
        answer = model.chat(tokenizer, pixel_values, question, settings, history=history, num_patches_list=num_tiles)
        assert hf_tokens == recorder.tokens
        assert tokenizer.decode(hf_tokens, skip_special_tokens=True).strip() == answer
