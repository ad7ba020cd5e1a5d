"""Data that several tests of the data path share: the recorded data sets, and records that cannot be used."""

import json
from functools import cache
from pathlib import Path

import torch

from internvl.arguments.training import DataTrainingArguments
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.model.tokenizers.loading import load_tokenizer

# Fields of a recorded configuration that are fields of ours.
SHARED = (
    "pad2square",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "normalize_type",
)


@cache
def tokenizer_of(folder: Path, model_max_length: int):
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = model_max_length
    return tokenizer


def recorded_dataset(goldens: Path, config: dict, **meta) -> LazySupervisedDataset:
    args = config["args"]
    data_args = DataTrainingArguments(
        conv_style=config["template"], force_image_size=args["image_size"], **{name: args[name] for name in SHARED}
    )
    folder = goldens / "dataset"
    # A recorded video is all pictures of a folder; ours takes them all, too, as long as it asks for more.
    root = "videos/" if "video" in config["annotation"] else config["root"]
    meta = {
        "root": str(folder / root),
        "annotation": str(folder / config["annotation"]),
        "repeat_time": args["repeat_time"],
        "data_augment": args["is_train"],
    } | meta
    tokenizer = tokenizer_of(goldens / config["tokenizer"], config["model_max_length"])
    return LazySupervisedDataset(config["ds_name"], meta, tokenizer, args["num_image_token"], data_args)


def recorded_configs(goldens: Path) -> dict[str, dict]:
    return json.loads((goldens / "dataset" / "configs.json").read_text())["configs"]


def recorded_items(goldens: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (goldens / "dataset" / "expected" / f"{name}.jsonl").read_text().splitlines()]


def samples_equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def turns(*values: str) -> list[dict]:
    return [{"from": role, "value": value} for role, value in zip(("human", "gpt") * 4, values, strict=False)]


QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A house by the river."}


# Case: record, and a pattern of the reason.
BAD = {
    "missing image": ({"image": "absent.png", "conversations": [QUESTION, ANSWER]}, "absent.png does not exist"),
    "truncated PNG": ({"image": "half_a.png", "conversations": [QUESTION, ANSWER]}, "half_a.png.*cannot be read"),
    "truncated JPEG": ({"image": "half_b.jpg", "conversations": [QUESTION, ANSWER]}, "half_b.jpg.*cannot be read"),
    "text as image": ({"image": "text.png", "conversations": [QUESTION, ANSWER]}, "text.png.*not an image"),
    "image is a number": ({"image": 3, "conversations": [QUESTION, ANSWER]}, "image is 3, not a path"),
    "images are numbers": ({"image": ["a.png", 3], "conversations": [QUESTION, ANSWER]}, "not a path or a list"),
    "missing video": ({"video": "absent.mp4", "conversations": [QUESTION, ANSWER]}, "absent.mp4"),
    "no JSON": ('{"conversations": [', "line 1 is not JSON"),
    "no object": ("[1, 2]", "line 1 is a JSON list"),
    "no conversations": ({"image": "a.png"}, "conversations must be a list.*None"),
    "zero turns": ({"conversations": []}, r"conversations must be a list.*\[\]"),
    "conversations are text": ({"conversations": "hello"}, "conversations must be a list.*'hello'"),
    "a turn is text": ({"conversations": ["hello"]}, "turn 1 must be.*'hello'"),
    "a value is no text": ({"conversations": [QUESTION, {"from": "gpt", "value": 7}]}, "turn 2 must be.*7"),
    "a turn without value": ({"conversations": [QUESTION, {"from": "gpt"}]}, "turn 2 must be"),
    "unknown role": ({"conversations": [{"from": "alien", "value": "x"}, ANSWER]}, "alien"),
    "no human turn": ({"image": "a.png", "conversations": [ANSWER]}, "no human turn"),
    "too few placeholders": (
        {"image": ["a.png", "b.jpg"], "conversations": [QUESTION, ANSWER]},
        "1 <image>.* 2 images",
    ),
    "no answer": ({"conversations": [{"from": "human", "value": "Hm?"}]}, "no answer to train on"),
    "image token as text": (
        {"conversations": [{"from": "human", "value": "<IMG_CONTEXT>"}, ANSWER]},
        "writes <IMG_CONTEXT>",
    ),
}
