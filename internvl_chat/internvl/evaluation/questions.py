"""From a record to the question that `chat` answers.

    turns of the record      system? human gpt human gpt ... human gpt
    -> Question              system message, history of (question, answer), question; the last answer is a reference

The prompt has the text that the same record has in training, before the last answer.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from internvl.constants import IMG_CONTEXT_TOKEN, UnusableSample
from internvl.data.chat_segments import IMAGE_PLACEHOLDER, TemplateRules, get_template_rules
from internvl.data.image_files import read_image_size
from internvl.data.schema import get_media, insert_placeholders, require_placeholders
from internvl.data.supervised_dataset import LazySupervisedDataset

Turns = Sequence[dict[str, str]]
# Keys of a record that metrics read.
METRIC_KEYS = ("choices", "width", "height", "answer_type", "precision")


class Question(NamedTuple):
    """The arguments of `chat` for a record.

    Attributes:
        text, history: with one `<image>` for each image or frame.
        system_message: replaces that of the model; None: the model's.
        num_tiles: of each image or frame, those of the history first.
    """

    text: str
    history: list[tuple[str, str]]
    system_message: str | None
    num_tiles: list[int]


def build_question(dataset: LazySupervisedDataset, index: int) -> Question:
    """Build the last question of a sample. No image is decoded.

    Raises:
        UnusableSample: the record has no question, or one that `chat` cannot ask as training would.
    """
    record = dataset.read_record(index)
    turns, _ = split_reference(dataset.list_conversations(record)[0])
    kind, _ = get_media(record)
    num_tiles = dataset.count_image_tiles(index)
    if not dataset.data_args.keep_surplus_placeholders:
        require_placeholders(turns, kind, len(num_tiles))
    if not any(turn["from"] != "system" for turn in turns):
        raise UnusableSample("the conversation has no question")
    turns = insert_placeholders(list(turns), kind, len(num_tiles))
    rules = get_template_rules(dataset.data_args.conv_style, turns)
    system_message, texts = _split_turns(turns, rules)
    _refuse_special_texts(turns, len(num_tiles))
    if rules.strip_values:
        texts = [text.strip() for text in texts]
    history = [
        (question, rules.format_answer(answer)) for question, answer in zip(texts[:-1:2], texts[1::2], strict=True)
    ]
    return Question(texts[-1], history, system_message, num_tiles)


def split_reference(turns: Turns) -> tuple[Turns, str | None]:
    """Split the gpt turns off the end; the last one is the reference."""
    end = len(turns)
    while end and turns[end - 1]["from"] == "gpt":
        end -= 1
    return turns[:end], turns[-1]["value"] if end < len(turns) else None


def _split_turns(turns: Turns, rules: TemplateRules) -> tuple[str | None, list[str]]:
    """Return the system message, and the texts of human and gpt in turn.

    Raises:
        UnusableSample: there are other turns; `chat` has pairs of question and answer.
    """
    first = int(turns[0]["from"] == "system")
    system_message = turns[0]["value"] if first else None
    # Like training, which leaves out an answer without a question where a conversation is tokenized as one string.
    if not rules.tokenize_per_message and turns[first]["from"] == "gpt":
        first += 1
    for number, (turn, expected) in enumerate(zip(turns[first:], cycle(("human", "gpt")), strict=False), first + 1):
        if turn["from"] != expected:
            raise UnusableSample(
                f"turn {number} is from {turn['from']}: a question and its history alternate between human and gpt, "
                "after an optional system turn"
            )
        if rules.tokenize_per_message and not turn["value"]:
            raise UnusableSample(f"turn {number} ({turn['from']}) is empty, which is not supported in a question")
    return system_message, [turn["value"] for turn in turns[first:]]


def _refuse_special_texts(turns: Turns, num_images: int) -> None:
    """Raise UnusableSample for texts that `chat` would take for an image."""
    for number, turn in enumerate(turns, start=1):
        role, text = turn["from"], turn["value"]
        # `chat` puts the images into the first placeholders of the whole prompt.
        if num_images and role != "human" and IMAGE_PLACEHOLDER in text:
            raise UnusableSample(
                f"turn {number} ({role}) contains {IMAGE_PLACEHOLDER}, in whose place the question would get an image"
            )
        refuse_reserved_token(text, f"turn {number} ({role})")


def refuse_reserved_token(text: str, name: str) -> None:
    """Raise UnusableSample if a text has the token that stands for images."""
    if IMG_CONTEXT_TOKEN in text:
        raise UnusableSample(f"{name} contains {IMG_CONTEXT_TOKEN}, which is reserved for images")


def list_references(record: dict, last_answer: str | None) -> list:
    """List the right answers: `answers` of the record, else its last answer."""
    answers = record.get("answers")
    return answers if answers is not None else [] if last_answer is None else [last_answer]


def build_prediction_record(dataset: LazySupervisedDataset, index: int, metric: str | None) -> dict:
    """Describe question, images and references of a sample, for `predictions.jsonl`.

    Images are absolute paths. The keys that metrics need are those of the record. `box_iou` needs the size of the
    image, which comes from its header where the record has none.
    """
    record = dataset.read_record(index)
    kind, _ = get_media(record)
    paths = dataset.list_media_paths(index)
    turns, reference = split_reference(dataset.list_conversations(record)[0])
    *history, question = [turn["value"] for turn in turns if turn["from"] in ("human", "gpt", "pretrain")] or [""]
    described: dict = {"video": paths[0]} if kind == "video" else {"images": paths}
    described |= {"question": question}
    if history:
        described["history"] = [list(pair) for pair in zip(history[::2], history[1::2], strict=False)]
    described["references"] = list_references(record, reference)
    described |= {key: record[key] for key in METRIC_KEYS if record.get(key) is not None}
    if metric == "box_iou" and kind == "image" and not {"width", "height"} <= described.keys():
        described["width"], described["height"] = read_image_size(paths[0], dataset.image_decoding)
    return described
