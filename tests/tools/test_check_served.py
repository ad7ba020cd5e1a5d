"""tools/check_served.py: which records are asked about, and what is wrong with a server.

`tests/serving/test_vllm.py` compares answers with vLLM's own server.
"""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.tiny_models import make_tiny_checkpoint
from PIL import Image
from tools.check_served import build_content, read_questions
from tools.check_served import main as check_served

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


def test_parts_of_a_message_keep_the_order_of_the_question(meta):
    contents = [build_content(question) for question in read_questions(str(meta), 50, [])]
    types = [[part["type"] for part in content] for content in contents[:2]]
    assert types == [["image_url", "text"], ["text", "image_url", "text"]]
    assert [part.get("text") for part in contents[1]] == ["Which is ", None, "here?"]
    assert contents[0][1]["text"] == "What?" and contents[2] == "Why?"
    assert contents[0][0]["image_url"]["url"].startswith("data:image/png;base64,iVBORw0KGgo")


@pytest.fixture
def folder(goldens, tmp_path):
    make_tiny_checkpoint(tmp_path / "model", goldens / "tokenizer")
    return tmp_path / "model"


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
