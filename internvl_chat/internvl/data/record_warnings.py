"""Find what is suspicious in the texts of usable records.

Such a record is valid and trained as it is, but often it is not what its author meant. `tools/check_data.py` counts
each kind.
"""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from internvl.data.foreign_keys import list_unused_keys
from internvl.data.schema import PLACEHOLDERS

MAX_COORDINATE = 1000  # InternVL's boxes are in thousandths of width and height
BOX = re.compile(r"<(box|quad)>(.{,2000}?)</\1>", re.DOTALL)
NUMBERS = re.compile(r"\[([-+.,\d\s]*)\]")  # a question may show the format with letters: [[x1, y1, x2, y2]]
FOREIGN_PLACEHOLDER = re.compile(r"<\|?(?:image|img|video|vision|audio|frame)[a-z_ -]*\d*\|?/?>", re.IGNORECASE)
CONTROL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|start|end|message|channel|return|endoftext|user|assistant|system)\|>"
)

Turns = Sequence[dict[str, str]]


def find_boxes(turns: Turns) -> list[list[float]]:
    """Return the coordinates of each box or quad in the turns."""
    boxes = []
    for turn in turns:
        for match in BOX.finditer(turn["value"]):
            for numbers in NUMBERS.findall(match[2]):
                try:
                    boxes.append([float(number) for number in numbers.split(",")])
                except ValueError:  # no numbers
                    continue
    return boxes


def has_box_outside(turns: Turns) -> bool:
    return any(not 0 <= number <= MAX_COORDINATE for box in find_boxes(turns) for number in box)


def has_inverted_box(turns: Turns) -> bool:
    return any(len(box) == 4 and (box[2] < box[0] or box[3] < box[1]) for box in find_boxes(turns))


def has_fractional_box(turns: Turns) -> bool:
    return any(0 < max(box) <= 1 and any(number % 1 for number in box) for box in find_boxes(turns))


def has_empty_answer(turns: Turns) -> bool:
    return any(turn["from"] == "gpt" and not turn["value"].strip() for turn in turns)


def has_roles_out_of_order(turns: Turns) -> bool:
    roles = [turn["from"] for turn in turns if turn["from"] != "system"]
    return roles[:1] == ["gpt"] or any(one == other for one, other in pairwise(roles))


def has_control_token(turns: Turns) -> bool:
    return any(CONTROL_TOKEN.search(turn["value"]) for turn in turns)


def has_foreign_placeholder(turns: Turns) -> bool:
    ours = (*PLACEHOLDERS.values(), "<img>")
    return any(match not in ours for turn in turns for match in FOREIGN_PLACEHOLDER.findall(turn["value"]))


# What is counted -> whether the turns of a record have it.
RECORD_WARNINGS: dict[str, Callable[[Turns], bool]] = {
    f"boxes outside 0-{MAX_COORDINATE}": has_box_outside,
    "boxes with x2 < x1 or y2 < y1": has_inverted_box,
    f"boxes in fractions of 1, expected 0-{MAX_COORDINATE}": has_fractional_box,
    "empty answers": has_empty_answer,
    "human and gpt turns that do not alternate": has_roles_out_of_order,
    "control tokens of a chat template as text": has_control_token,
    "placeholders other than <image> and <video>": has_foreign_placeholder,
}


def find_warnings(conversations: Sequence[Turns], record: dict, known_keys: tuple[str, ...]) -> list[str]:
    """List what is suspicious in a record.

    These are keys of RECORD_WARNINGS, and keys with content that is not used.
    """
    warnings = [name for name, has_warning in RECORD_WARNINGS.items() if any(map(has_warning, conversations))]
    texts = [turn["value"] for turns in conversations for turn in turns]
    unused = list_unused_keys(record, known_keys, texts)
    return warnings + [f"content in the key {key:.50}, which is not used" for key in unused]
