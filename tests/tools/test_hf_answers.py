"""A converted checkpoint from pictures to tokens: transformers' classes and processor write what `chat` writes."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tools.internvl_custom2hf import main as custom2hf
from transformers import AutoModelForImageTextToText, AutoProcessor

from internvl.data.images import build_transform, dynamic_preprocess
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer


class Written:
    """A streamer that keeps the tokens."""

    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        pass


GREEDY = {"max_new_tokens": 64, "do_sample": False}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_the_processor_and_generate_write_the_tokens_of_chat(kind, adapted, goldens, tmp_path):
    """Pictures in, 64 tokens out: a question about two pictures of several tiles and a thumbnail, and a dialogue.

    With the templates and tokenizers of the goldens; without and with adapters, which are merged on the way.
    """
    custom, hf = tmp_path / "custom", tmp_path / "hf"
    shutil.copytree(goldens / "e2e" / kind, custom, copy_function=shutil.copyfile)
    custom.chmod(0o755)
    made_of = json.loads((custom / "expected.json").read_text())["tokenizer"]
    for file in (goldens / made_of).iterdir():
        shutil.copyfile(file, custom / file.name)
    model = InternVLChatModel.from_pretrained(custom)
    if adapted:
        model.config.use_backbone_lora = model.config.use_llm_lora = 2
        model.wrap_backbone_lora(2, 4)
        model.wrap_llm_lora(2, 4)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(custom)
    custom2hf(["--custom_path", str(custom), "--save_path", str(hf)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["custom", "hf"]

    model.eval()
    tokenizer, native = load_tokenizer(custom), AutoModelForImageTextToText.from_pretrained(hf).eval()
    processor = AutoProcessor.from_pretrained(hf)
    for line in (goldens / made_of / "encodings.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert processor.tokenizer(row["text"]).input_ids == row["ids"], row["text"]

    pictures = [Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB") for size in ((112, 56), (56, 168))]
    limits = 1, model.config.max_dynamic_patch, 56, model.config.use_thumbnail
    tiles = [dynamic_preprocess(picture, *limits) for picture in pictures]
    assert [len(each) for each in tiles] == [3, 4]
    told = "What is this?", "A fractal."
    for count, question, earlier in ((2, "Which is larger?", None), (1, "What is this?", None), (1, "Really?", told)):
        shown = [tile for each in tiles[:count] for tile in each]
        pixels = torch.stack([build_transform(False, 56)(tile) for tile in shown])
        turns = [("user", question)]
        if earlier:
            turns = [("user", earlier[0]), ("assistant", earlier[1]), ("user", question)]
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        messages[0]["content"][:0] = [{"type": "image", "image": picture} for picture in pictures[:count]]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        torch.testing.assert_close(inputs["pixel_values"], pixels, atol=0.05, rtol=0)  # torchvision's resize, not PIL's
        with torch.no_grad():
            written = native.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        ours = Written()
        history = earlier and [("<image>\n" + earlier[0], earlier[1])]
        patches = [len(each) for each in tiles[:count]]
        settings = {**GREEDY, "streamer": ours}
        answer = model.chat(tokenizer, pixels, question, settings, history=history, num_patches_list=patches)
        assert written == ours.tokens
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer
