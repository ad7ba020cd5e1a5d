"""Samples of the data tests: upstream's recorded datasets, and unusable records."""

import json
from functools import cache
from pathlib import Path

import PIL
import torch
import torchvision

from internvl.arguments.data import DataTrainingArguments
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.model.tokenizers.loading import load_tokenizer

# The versions that the goldens were recorded with; other ones may round differently.
HAS_RECORDED_VERSIONS = PIL.__version__ == "13.0.0" and torchvision.__version__.startswith("0.29.1")
ROUNDING_TOLERANCE = 0.04  # two steps of 1 / 255, normalized
# Settings of a recorded configuration that are fields of DataTrainingArguments.
RECORDED_FLAGS = (
    "pad2square",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "normalize_type",
)


@cache
def load_cached_tokenizer(folder: Path, model_max_length: int):
    """Load a tokenizer once per folder and maximum length."""
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = model_max_length
    return tokenizer


def read_recorded_configs(goldens: Path) -> dict[str, dict]:
    """Read the configurations that upstream's samples were recorded with, by name."""
    return json.loads((goldens / "dataset" / "configs.json").read_text())["configs"]


def read_recorded_samples(goldens: Path, name: str) -> list[dict]:
    """Read upstream's samples of a configuration."""
    return [json.loads(line) for line in (goldens / "dataset" / "expected" / f"{name}.jsonl").read_text().splitlines()]


def build_recorded_dataset(goldens: Path, config: dict, **meta) -> LazySupervisedDataset:
    """Build our dataset of a recorded configuration; `meta` overrides its meta entry."""
    args = config["args"]
    flags = {name: args[name] for name in RECORDED_FLAGS}
    flags |= {"conv_style": config["template"], "force_image_size": args["image_size"]}
    # One of the recorded images is transparent, which upstream draws on black.
    data_args = DataTrainingArguments(**flags, upstream_image_decoding=True)
    folder = goldens / "dataset"
    # A recorded video is all images of a folder. Ours reads all of them, too, as long as it asks for more.
    root = "videos/" if "video" in config["annotation"] else config["root"]
    meta = {
        "root": str(folder / root),
        "annotation": str(folder / config["annotation"]),
        "repeat_time": args["repeat_time"],
        "data_augment": args["is_train"],
    } | meta
    tokenizer = load_cached_tokenizer(goldens / config["tokenizer"], config["model_max_length"])
    return LazySupervisedDataset(config["ds_name"], meta, tokenizer, args["num_image_token"], data_args)


def are_samples_equal(one: dict, other: dict) -> bool:
    """Return whether all tensors of `one` equal those of `other`."""
    return all(torch.equal(one[key], other[key]) for key in one)


def make_turns(*values: str) -> list[dict]:
    """Make a conversation of these values, from human and gpt alternately."""
    return [{"from": role, "value": value} for role, value in zip(("human", "gpt") * 4, values, strict=False)]


QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A house by the river."}


# Case -> record (or line), pattern of the reason. The image files are those of the fixture `make`.
UNUSABLE_RECORDS = {
    "missing image": ({"image": "absent.png", "conversations": [QUESTION, ANSWER]}, "absent.png does not exist"),
    "truncated PNG": ({"image": "half_a.png", "conversations": [QUESTION, ANSWER]}, "half_a.png.*cannot be read"),
    "truncated JPEG": ({"image": "half_b.jpg", "conversations": [QUESTION, ANSWER]}, "half_b.jpg.*cannot be read"),
    "text as image": ({"image": "text.png", "conversations": [QUESTION, ANSWER]}, "text.png.*not an image"),
    "image is a number": ({"image": 3, "conversations": [QUESTION, ANSWER]}, "image must be a path.*got 3"),
    "images are numbers": ({"image": ["a.png", 3], "conversations": [QUESTION, ANSWER]}, "a path or a list of paths"),
    "missing video": ({"video": "absent.mp4", "conversations": [QUESTION, ANSWER]}, "absent.mp4"),
    "no JSON": ('{"conversations": [', "line 1 is not JSON"),
    "no object": ("[1, 2]", "line 1: expected a JSON object, got list"),
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
    "no answer": ({"conversations": [{"from": "human", "value": "Hm?"}]}, "no loss tokens: .* has no answer"),
    "image token as text": (
        {"conversations": [{"from": "human", "value": "<IMG_CONTEXT>"}, ANSWER]},
        "contains <IMG_CONTEXT>",
    ),
}
