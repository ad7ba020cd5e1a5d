"""Compare a server's answers with those of `model.chat`.

    python tools/check_served.py URL FOLDER META [--model NAME] [--number N]

URL is an OpenAI-compatible server (vLLM, SGLang, lmdeploy), such as http://localhost:8000. It is asked the first
question of N records of the datasets in META, at temperature 0, and so is the chat model in FOLDER. Images are sent as
PNG, with the pixels that the model in FOLDER gets. OPENAI_API_KEY is sent if set. Exit status: 1 if answers differ or
cannot be had, else 0.
"""

import argparse
import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from internvl.command_line import CHAT_MODEL_TYPE, exit_on_user_error, require_checkpoint_dir
from internvl.constants import CUT_CHARACTER, UnusableSample
from internvl.data.annotations import open_annotations
from internvl.data.file_io import join_root, require_inside_root
from internvl.data.image_files import load_image
from internvl.data.images import build_transform, dynamic_preprocess
from internvl.data.schema import get_media, get_turns, load_meta, validate_meta_entry
from internvl.evaluation.checkpoint_settings import load_chat_model
from internvl.model.auxiliary_files import describe_ignored_by_engines, read_normalization
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.chat import IMAGE_PLACEHOLDER
from internvl.model.internvl_chat.configuration_internvl_chat import get_tile_size
from internvl.model.internvl_chat.generation import GENERATION_CONFIG_FILE
from internvl.regular_files import read_json_object
from internvl.tool_parser import ToolParser

MAX_RESPONSE_BYTES = 2**24
# Settings of generation_config.json that servers apply even without sampling, and `chat` never -> the neutral value.
NEUTRAL_SETTINGS = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Question(NamedTuple):
    """The first question of a record, about at most one image."""

    location: str  # for messages
    text: str
    image: Image.Image | None
    system_message: str | None


class Answer(NamedTuple):
    text: str
    is_cut: bool = False  # at the maximum number of tokens


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    folder = require_checkpoint_dir(args.folder, CHAT_MODEL_TYPE)
    model_name = choose_model(args.url, args.model, args.timeout)
    ignored_note = describe_ignored_by_engines(InternVLChatConfig.from_pretrained(folder), folder)
    settings = {"max_tokens": args.max_new_tokens, **list_neutral_settings(folder)}
    skipped: list[str] = []
    questions = read_questions(args.meta, args.number, skipped)
    if not questions:
        raise ValueError(f"{args.meta} has no record to ask about: {skipped[0] if skipped else 'it is empty'}")
    ours = answer_locally(str(folder), questions, args.max_new_tokens, args.dtype)
    served = [ask(args.url, model_name, question, settings, args.timeout) for question in questions]
    num_different = print_differences(questions, ours, served)
    rows = {
        "Questions": len(questions),
        "Equal answers": len(questions) - num_different,
        "Different answers": num_different,
        "Records skipped": len(skipped),
    }
    print(f"{model_name} at {args.url}, compared with {folder}:")
    print("\n".join(f"  {name:<18} {count:>6}" for name, count in rows.items()))
    if num_cut := sum(answer.is_cut for answer in served):
        print(f"Note: {num_cut} answers were cut off after {args.max_new_tokens} tokens: raise --max_new_tokens")
    if skipped:
        print(f"Note: skipped, for example {skipped[0]}")
    if num_different and ignored_note:
        print(f"Note: {ignored_note}")
    sys.exit(1 if num_different else 0)


def parse_args(argv) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("url", metavar="URL", help="of the server, with or without /v1")
    parser.add_argument("folder", metavar="FOLDER", help="chat checkpoint with the expected answers")
    parser.add_argument("meta", metavar="META", help="JSON file that lists the datasets")
    parser.add_argument("--model", help="name of the served model (default: the only one)")
    parser.add_argument("--number", type=int, default=50, help="number of questions (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of FOLDER (default: its own)")
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds to wait for an answer (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name in ("number", "max_new_tokens", "timeout"):
        if not 0 < getattr(args, name) < 1e9:
            raise ValueError(f"--{name} {getattr(args, name)} is invalid: expected a positive number")
    if not args.url.startswith(("http://", "https://")):
        raise ValueError(f"URL {args.url!r:.80} is invalid: expected http://HOST:PORT")
    args.url = args.url.rstrip("/").removesuffix("/v1")
    return args


# -- questions ---------------------------------------------------------------------------------------------------------


def read_questions(meta_path: str, number: int, skipped: list[str]) -> list[Question]:
    """Read the first questions of a meta file.

    Args:
        skipped: gets the location and the reason of each skipped record.
    """
    questions: list[Question] = []
    for location, root, record_fn in list_records(meta_path):
        if len(questions) == number:
            break
        try:
            questions.append(build_question(location, root, record_fn()))
        except UnusableSample as error:
            skipped.append(f"{location}: {error}")
    return questions


def list_records(meta_path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield location, image root and a function that reads the record."""
    for name, entry in load_meta(meta_path).items():
        validate_meta_entry(name, entry)
        annotations = open_annotations(entry["annotation"])
        for index in range(len(annotations)):
            location = f"{name} line {annotations.line_number(index)}"
            yield location, entry["root"], lambda index=index, annotations=annotations: annotations[index]


def build_question(location: str, root: str, record: dict) -> Question:
    """Build the first question of a record.

    Raises:
        UnusableSample: the record is malformed, has several images or a video, or no question.
    """
    kind, paths = get_media(record)
    if kind == "video" or len(paths) > 1:
        media = "a video" if kind == "video" else f"{len(paths)} images"
        raise UnusableSample(f"it has {media}, only records with at most one image are asked about")
    turns = get_turns(record)
    system_message = turns[0]["value"] if turns[0]["from"] == "system" else None
    texts = [turn["value"] for turn in turns if turn["from"] == "human"]
    if not texts:
        raise UnusableSample("it has no turn from human")
    image = load_image(require_inside_root(root, join_root(root, paths[0]))) if paths else None
    if texts[0].count(IMAGE_PLACEHOLDER) > len(paths):
        raise UnusableSample(f"its question has more {IMAGE_PLACEHOLDER} than images")
    return Question(location, texts[0], image, system_message)


# -- answers -----------------------------------------------------------------------------------------------------------


def answer_locally(folder: str, questions: list[Question], max_new_tokens: int, dtype: str | None) -> list[Answer]:
    """Answer questions by `model.chat`."""
    model, tokenizer = load_chat_model(folder, getattr(torch, dtype) if dtype else "auto")
    default_message, normalization, answers = model.system_message, read_normalization(folder), []
    for question in questions:
        tiles = load_tiles(question.image, model.config, normalization) if question.image else None
        if tiles is not None:
            tiles = tiles.to(model.device, model.dtype)
        model.system_message = default_message if question.system_message is None else question.system_message
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
        answer = model.chat(tokenizer, tiles, question.text, settings)
        assert isinstance(answer, str)  # a pair only with `return_history`
        answers.append(Answer(answer))
    return answers


def load_tiles(image: Image.Image, config, normalization: tuple[list[float], list[float]]) -> torch.Tensor:
    """Preprocess an image: tiles (T, 3, S, S).

    Args:
        normalization: mean and standard deviation of the channels.
    """
    size = get_tile_size(config)
    tiling = config.min_dynamic_patch, config.max_dynamic_patch, size, config.use_thumbnail
    tiles = dynamic_preprocess(image, *tiling) if config.dynamic_image_size else [image]
    transform = build_transform(False, size, config.pad2square, statistics=normalization)
    return torch.stack([transform(tile) for tile in tiles])


def choose_model(url: str, name: str | None, timeout: float) -> str:
    """Return the name of the model to ask.

    Raises:
        ValueError: the server is not reachable, or does not serve exactly the requested model.
    """
    models = request(url, "models", None, timeout).get("data")
    served = [str(entry["id"]) for entry in models or [] if isinstance(entry, dict) and "id" in entry]
    if name is None and len(served) == 1:
        return served[0]
    if name not in served:
        asked = "several models or none" if name is None else f"no model {name!r:.80}"
        raise ValueError(f"{url} serves {asked}: pass --model with one of {', '.join(served) or '(none)'}")
    return name


def list_neutral_settings(folder: Path) -> dict[str, float]:
    """List the fields of a request that switch off penalties in the folder's `generation_config.json`.

    Others are not sent: a server may refuse fields that it does not know.
    """
    file = folder / GENERATION_CONFIG_FILE
    stored = read_json_object(file) if file.is_file() else {}
    return {name: value for name, value in NEUTRAL_SETTINGS.items() if stored.get(name) is not None}


def ask(url: str, model_name: str, question: Question, settings: dict, timeout: float) -> Answer:
    """Ask the server a question, at temperature 0.

    Args:
        settings: more fields of the request, such as `max_tokens`.

    Raises:
        ValueError: there is no answer.
    """
    messages: list[dict] = [{"role": "user", "content": build_content(question)}]
    if question.system_message is not None:
        messages.insert(0, {"role": "system", "content": question.system_message})
    body = {"model": model_name, "messages": messages, "temperature": 0, **settings}
    response = request(url, "chat/completions", body, timeout)
    try:
        choice = response["choices"][0]
        return Answer((choice["message"]["content"] or "").strip(), choice.get("finish_reason") == "length")
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{url} sent no answer to {question.location}, but {json.dumps(response):.200}") from None


def build_content(question: Question) -> str | list[dict]:
    """Build the content of a message: the image, then the question as it is.

    Where the question has a typed `<image>`, the server's chat template puts the image there; otherwise it writes
    `<image>` and a line break first, as `chat` does.
    """
    if question.image is None:
        return question.text
    file = io.BytesIO()
    question.image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]


def request(url: str, path: str, body: dict | None, timeout: float) -> dict:
    """Send a request to the server and return its JSON object.

    Raises:
        ValueError: there is no such server, no answer in time, or an error, with the server's message.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/{path}", data, headers), timeout=timeout) as file:
            response = json.loads(file.read(MAX_RESPONSE_BYTES))
    except urllib.error.HTTPError as error:
        message = error.read(2000).decode(errors="replace")
        raise ValueError(f"{url}/v1/{path} answered with status {error.code}: {message!r:.400}") from None
    except TimeoutError:
        raise ValueError(f"{url} did not answer within {timeout:g} s: raise --timeout") from None
    except OSError as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise ValueError(f"{url} did not answer within {timeout:g} s: raise --timeout") from None
        raise ValueError(f"{url} is not reachable: {getattr(error, 'reason', error)}") from None
    except ValueError:
        raise ValueError(f"{url}/v1/{path} sent no JSON: is it an OpenAI-compatible server?") from None
    if not isinstance(response, dict):
        raise ValueError(f"{url}/v1/{path} sent {response!r:.80}, expected a JSON object")
    return response


# -- comparison --------------------------------------------------------------------------------------------------------


def print_differences(questions: list[Question], ours: list[Answer], served: list[Answer]) -> int:
    """Print questions with different answers and return their number."""
    num_different = 0
    for question, our_answer, served_answer in zip(questions, ours, served, strict=True):
        # The end of a cut answer depends on how a tokenizer decodes half a character.
        texts = [answer.text.rstrip(CUT_CHARACTER).strip() for answer in (our_answer, served_answer)]
        if texts[0] != texts[1]:
            num_different += 1
            print(f"{question.location}: {question.text!r}\n  ours:   {texts[0]!r}\n  served: {texts[1]!r}")
    return num_different


if __name__ == "__main__":
    main()
