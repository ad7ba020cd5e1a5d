"""How well a model reads held-out digits, asked through `batch_chat` as a user would ask it.

A stage of shell/quickstart.sh after each training. An answer counts if the whole of it is what was asked for: "7", or
"The digit is 7." Writes all answers, so that two models can be compared scan by scan.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from internvl.data.images import build_transform, dynamic_preprocess, load_image
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

ANSWER = re.compile(r"(?:The digit is )?([0-9])\.?")
SETTINGS = {"max_new_tokens": 12, "do_sample": False}
BATCH = 50
SPOT_CHECKS = 3


def parse(answer: str) -> int | None:
    """The digit that an answer names; None if it says anything else."""
    match = ANSWER.fullmatch(answer)
    return int(match[1]) if match else None


def tiles_of(config) -> Callable[[Path], torch.Tensor]:
    """Image file -> tiles (T, 3, S, S), cut as the model was trained."""
    size = config.force_image_size
    most = config.max_dynamic_patch if config.dynamic_image_size else 1
    transform = build_transform(is_train=False, input_size=size, pad2square=config.pad2square)

    def read(path: Path) -> torch.Tensor:
        image = load_image(str(path))
        tiles = dynamic_preprocess(image, config.min_dynamic_patch, most, size, config.use_thumbnail)
        return torch.stack([transform(tile) for tile in tiles])

    return read


def ask(model: InternVLChatModel, tokenizer, annotation: Path) -> dict:
    """Answers to all questions of an annotation file, whose images lie beside it.

    `chat_agrees` counts those of the first questions to which `chat`, asked one by one, answers as `batch_chat` did.
    """
    records = [json.loads(line) for line in annotation.read_text().splitlines()]
    read, answers, alone, start = tiles_of(model.config), [], [], time.monotonic()
    for first in range(0, len(records), BATCH):
        batch = records[first : first + BATCH]
        questions = [record["conversations"][0]["value"] for record in batch]
        tiles = [read(annotation.parent / record["image"]).to(model.device, model.dtype) for record in batch]
        counts = [len(images) for images in tiles]
        answers += model.batch_chat(tokenizer, torch.cat(tiles), questions, SETTINGS, num_patches_list=counts)
        if first == 0:
            checks = zip(tiles[:SPOT_CHECKS], questions, strict=False)
            alone = [model.chat(tokenizer, images, question, SETTINGS) for images, question in checks]
    digits = [record["digit"] for record in records]
    return {
        "correct": sum(parse(answer) == digit for answer, digit in zip(answers, digits, strict=True)),
        "total": len(records),
        "chat_agrees": sum(a == b for a, b in zip(alone, answers, strict=False)),
        "seconds": round(time.monotonic() - start, 1),
        "images": [record["image"] for record in records],
        "digits": digits,
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="JSON file for the answers, by name of the annotation file")
    parser.add_argument("annotations", type=Path, nargs="+", help="JSONL files of conversations about digits")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    model = InternVLChatModel.from_pretrained(args.model, dtype=torch.bfloat16).eval().to(device)
    answers = {annotation.stem: ask(model, tokenizer, annotation) for annotation in args.annotations}
    args.output.write_text(json.dumps(answers))
    for name, found in answers.items():
        print(f"{args.model} on {name}: {found['correct']} of {found['total']} right in {found['seconds']} s")


if __name__ == "__main__":
    main()
