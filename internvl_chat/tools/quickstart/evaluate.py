"""Measure how many held-out digits a model reads, through `batch_chat`.

An answer is correct if it is only the right digit ("7") or the sentence "The digit is 7." All answers are saved to
compare models scan by scan.
"""

import argparse
import json
import re
import time
from pathlib import Path

import torch

from internvl.data.images import build_transform, dynamic_preprocess, load_image
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

ANSWER_PATTERN = re.compile(r"(?:The digit is )?([0-9])\.?")
GENERATION_CONFIG = {"max_new_tokens": 12, "do_sample": False}
BATCH_SIZE = 50
NUM_CHAT_CHECKS = 3


def parse_digit(answer: str) -> int | None:
    """Return the digit of an answer, or None for any other answer."""
    match = ANSWER_PATTERN.fullmatch(answer)
    return int(match[1]) if match else None


def load_tiles(path: Path, config) -> torch.Tensor:
    """Load an image as preprocessed tiles, (T, 3, S, S)."""
    size = config.force_image_size
    max_tiles = config.max_dynamic_patch if config.dynamic_image_size else 1
    transform = build_transform(is_train=False, input_size=size, pad2square=config.pad2square)
    tiles = dynamic_preprocess(load_image(str(path)), config.min_dynamic_patch, max_tiles, size, config.use_thumbnail)
    return torch.stack([transform(tile) for tile in tiles])


def evaluate(model: InternVLChatModel, tokenizer, annotation: Path) -> dict:
    """Answer all questions of an annotation file.

    Images are relative to the file's folder. `num_chat_matches` counts for the first questions how often `chat`, one
    at a time, gives the same answer as `batch_chat`.
    """
    records = [json.loads(line) for line in annotation.read_text().splitlines()]
    digits = [record["digit"] for record in records]
    answers, chat_answers, num_correct, start = [], [], 0, time.monotonic()
    for first in range(0, len(records), BATCH_SIZE):
        batch = records[first : first + BATCH_SIZE]
        questions = [record["conversations"][0]["value"] for record in batch]
        paths = [annotation.parent / record["image"] for record in batch]
        images = [load_tiles(path, model.config).to(model.device, model.dtype) for path in paths]
        num_tiles = [len(tiles) for tiles in images]
        answers += model.batch_chat(
            tokenizer, torch.cat(images), questions, GENERATION_CONFIG, num_patches_list=num_tiles
        )
        if first == 0:
            checks = zip(images[:NUM_CHAT_CHECKS], questions, strict=False)
            chat_answers = [model.chat(tokenizer, tiles, question, GENERATION_CONFIG) for tiles, question in checks]
        num_correct = sum(parse_digit(answer) == digit for answer, digit in zip(answers, digits, strict=False))
        seconds = time.monotonic() - start
        print(format_progress(annotation.stem, len(answers), len(records), num_correct, seconds), flush=True)
    return {
        "correct": num_correct,
        "total": len(records),
        "num_chat_matches": sum(a == b for a, b in zip(chat_answers, answers, strict=False)),
        "seconds": round(time.monotonic() - start, 1),
        "images": [record["image"] for record in records],
        "digits": digits,
        "answers": answers,
    }


def format_progress(name: str, num_answers: int, total: int, num_correct: int, seconds: float) -> str:
    """Format a progress line, which shell/quickstart.sh shows."""
    minutes_left, seconds_left = divmod(round(seconds / num_answers * (total - num_answers)), 60)
    accuracy = num_correct / num_answers
    return f"{name} question {num_answers}/{total}  accuracy {accuracy:.1%}  left {minutes_left}:{seconds_left:02}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("output", type=Path, help="JSON file for the answers, by name of the annotation file")
    parser.add_argument("annotations", type=Path, nargs="+", help="annotation files (JSONL) about digits")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    model = InternVLChatModel.from_pretrained(args.model, dtype=torch.bfloat16).eval().to(device)
    results = {annotation.stem: evaluate(model, tokenizer, annotation) for annotation in args.annotations}
    args.output.write_text(json.dumps(results))
    for name, result in results.items():
        print(f"{args.model}, {name}: {result['correct']} of {result['total']} correct in {result['seconds']} s")


if __name__ == "__main__":
    main()
