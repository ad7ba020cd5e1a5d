"""tools/check_served.py: which records are asked about, and what is wrong with a server.

`tests/serving/test_vllm.py` compares answers with vLLM's own server.
"""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.tiny_models import make_tiny_checkpoint
from PIL import Image

from internvl.data.images import NORMALIZATION_STATS, build_transform
from internvl.model.auxiliary_files import build_preprocessor_config, read_normalization
from internvl.model.chat_template import set_chat_template
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.check_served import Question, build_content, list_neutral_settings, load_tiles, read_questions
from internvl.tools.check_served import main as check_served

ANSWER = {"from": "gpt", "value": "A tile."}


@pytest.fixture
def meta(tmp_path):
    """Two datasets: three usable records among others."""
    for name in "ab":
        Image.new("RGB", (60, 40), (200, 10, 10)).save(tmp_path / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, ANSWER]
    records = [
        {"image": "a.png", "conversations": [{"from": "system", "value": "Be brief."}, *turns]},
        {"image": ["a.png", "b.png"], "conversations": turns},
        {"video": "a.mp4", "conversations": turns},
        {"image": "a.png", "conversations": [ANSWER]},
        {"image": "gone.png", "conversations": turns},
        {"image": "../a.png", "conversations": turns},
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image> or <image>?"}, ANSWER]},
        {"image": "b.png", "conversations": [{"from": "human", "value": "Which is <image>\nhere?"}, ANSWER]},
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "text.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "Why?"}, ANSWER]}))
    entries = {
        name: {"root": str(tmp_path), "annotation": str(tmp_path / f"{name}.jsonl")} for name in ("mixed", "text")
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return tmp_path / "meta.json"


def test_questions_are_those_about_at_most_one_image(meta):
    skipped: list[str] = []
    questions = read_questions(str(meta), 50, skipped)
    assert [question.location for question in questions] == ["mixed line 1", "mixed line 8", "text line 1"]
    assert [question.system_message for question in questions] == ["Be brief.", None, None]
    reasons = ["2 images", "a video", "no turn from human", "gone.png", "outside", "more <image> than images"]
    assert len(skipped) == len(reasons) and all(part in text for part, text in zip(reasons, skipped, strict=True))
    assert skipped[0].startswith("mixed line 2: ")
    assert len(read_questions(str(meta), 2, [])) == 2


def test_content_is_the_image_and_the_question_as_it_is(meta):
    contents = [build_content(question) for question in read_questions(str(meta), 50, [])]
    image, text = contents[1]
    assert image["type"] == "image_url" and image["image_url"]["url"].startswith("data:image/png;base64,iVBORw0KGgo")
    assert text == {"type": "text", "text": "Which is <image>\nhere?"} and contents[2] == "Why?"


@pytest.fixture
def folder(goldens, tmp_path):
    make_tiny_checkpoint(tmp_path / "model", goldens / "tokenizer")
    return tmp_path / "model"


QUESTIONS = ["<image>\nWhat?", "What?\n<image>", "<image>What?", "<image>", "Is <image> a dog?", "Is <image>\na dog?"]
QUESTIONS += ["<image>\n\nWhat?", "<image> \nWhat? ", "What?"]


@pytest.mark.parametrize("image_text", ["<image>", "<IMG_CONTEXT>"], ids=["chat layout", "HF layout"])
def test_prompt_of_the_server_is_that_of_chat(image_text, folder, capsys):
    model, tokenizer = InternVLChatModel.from_pretrained(folder).eval(), load_tokenizer(folder)
    set_chat_template(tokenizer, model.config, image_text)
    image = Image.new("RGB", (56, 56))
    tiles = load_tiles(image, model.config, read_normalization(folder))
    for text in QUESTIONS:
        messages = [{"role": "user", "content": build_content(Question("", text, image, None))}]
        served = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        capsys.readouterr()
        model.chat(tokenizer, tiles, text, {"max_new_tokens": 1, "do_sample": False}, verbose=True)
        assert served == capsys.readouterr().out[:-1].replace("<image>", image_text), text


@pytest.mark.parametrize("pad2square", [False, True])
@pytest.mark.parametrize("normalize_type", NORMALIZATION_STATS)
def test_tiles_have_the_normalization_and_padding_of_the_folder(normalize_type, pad2square, folder):
    settings = build_preprocessor_config(56, *NORMALIZATION_STATS[normalize_type])
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    config = InternVLChatConfig.from_pretrained(folder)
    config.pad2square = pad2square
    image = Image.effect_mandelbrot((112, 56), (-2, -1, 1, 1), 50).convert("RGB")
    transform = build_transform(False, 56, pad2square, normalize_type)
    config.dynamic_image_size = True
    tiles = load_tiles(image, config, read_normalization(folder))
    assert len(tiles) == 3 and torch.equal(tiles[0], transform(image.crop((0, 0, 56, 56))))
    config.dynamic_image_size = False  # as in training, the image is transformed without tiling
    [tile] = load_tiles(image, config, read_normalization(folder))
    assert torch.equal(tile, transform(image))


def test_only_penalties_of_the_folder_are_switched_off(folder):
    file = folder / "generation_config.json"
    file.write_text('{"repetition_penalty": 1.05, "presence_penalty": null, "temperature": 0.7, "top_k": 20}')
    assert list_neutral_settings(folder) == {"repetition_penalty": 1.0}
    file.write_text('{"presence_penalty": 0.5, "frequency_penalty": 0.1}')
    assert list_neutral_settings(folder) == {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    file.unlink()
    assert list_neutral_settings(folder) == {}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["http://127.0.0.1:9"], "http://127.0.0.1:9 is not reachable: .*Connection refused"),
        (["localhost:8000"], "URL 'localhost:8000' is invalid: expected http://HOST:PORT"),
        (["http://127.0.0.1:9", "--number", "0"], "--number 0 is invalid: expected a positive number"),
    ],
)
def test_errors_before_the_model_is_loaded(flags, message, folder, meta):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        check_served([flags[0], str(folder), str(meta), *flags[1:]])


@pytest.mark.parametrize(
    "models, message",
    [
        (None, "/v1/models answered with status 404: "),
        ("<html></html>", "/v1/models sent no JSON: is it an OpenAI-compatible server"),
        ("[]", r"/v1/models sent \[\], expected a JSON object"),
        ('{"data": []}', r"serves several models or none: pass --model with one of \(none\)"),
        ('{"data": [{"id": "tiny"}]}', "/v1/chat/completions answered with status 501: "),
    ],
)
def test_another_kind_of_server_is_an_error(models, message, folder, meta, tmp_path):
    site = tmp_path / "site"
    (site / "v1").mkdir(parents=True)
    if models:
        (site / "v1/models").write_text(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    flags = ["--number", "1", "--max_new_tokens", "2"]
    try:
        with pytest.raises(SystemExit, match=f"^error: {url}.*{message}"):
            check_served([url, str(folder), str(meta), *flags])
    finally:
        server.shutdown()
        server.server_close()
