"""Schema of meta files and annotation records.

Reads, validates and normalizes them. No image is opened here.
"""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress

from internvl.constants import MAX_TILES_PER_IMAGE, UnusableSample, shorten
from internvl.data.chat_segments import IMAGE_PLACEHOLDER, ROLES_WITH_IMAGES
from internvl.data.file_io import fetch_local_copy
from internvl.data.foreign_keys import (
    ABSENT_VALUES,
    MEDIA_KINDS,
    TURN_KEYS,
    list_text_keys,
    normalize_key,
    refuse_foreign_keys,
    refuse_foreign_turn_keys,
)
from internvl.regular_files import MAX_JSON_BYTES, open_regular_file, refuse_lfs_pointer, require_unique_keys

MAX_NAME_LENGTH = 255
MAX_PATH_BYTES = 4096  # PATH_MAX of Linux
CONTENT_IN_PATH = re.compile(r"""data:\w+/|\[\s*["']|\{\s*["']""")  # a data URL, or a list or object as text

# Use of a dataset: trained, evaluated, or evaluated as recorded answers of the base model.
TRAIN_SPLIT, EVAL_SPLIT, BASE_ANSWERS_SPLIT = SPLITS = "train", "eval", "base_answers"
# Metrics of generated answers, which `evaluation/scores.py` computes.
METRIC_NAMES = tuple(
    "exact_match vqa_accuracy anls relaxed_accuracy token_f1 multiple_choice yes_no box_iou counting number cider bleu "
    "rouge_l cer wer".split()
)
SCORERS = ("internvl",)  # other readings of a metric than its benchmark's


def describe_choices(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"one of {', '.join(values)}"


# Key of a meta entry -> its valid values, in words and as a check. `length` is informational and not used.
META_KEYS = {
    "root": ("a path", lambda value: value == "" or is_path(value)),
    "annotation": ("a path", lambda value: is_path(value)),
    "repeat_time": ("a positive number", lambda value: type(value) in (int, float) and 0 < value < float("inf")),
    "data_augment": ("true or false", lambda value: isinstance(value, bool)),
    "max_dynamic_patch": (
        f"a positive integer up to {MAX_TILES_PER_IMAGE}",
        lambda value: type(value) is int and 1 <= value <= MAX_TILES_PER_IMAGE,
    ),
    "length": ("anything", lambda value: True),
    "split": (describe_choices(SPLITS), lambda value: value in SPLITS),
    "metric": (describe_choices(METRIC_NAMES), lambda value: value in METRIC_NAMES),
    "scorer": (describe_choices(SCORERS), lambda value: value in SCORERS),
}
REQUIRED_META_KEYS = ("root", "annotation")

PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": "<video>"}

ROLES = ("system", "human", "gpt", "pretrain", "function")
# Role in other frameworks, in lower case -> ours.
ROLE_ALIASES = {"user": "human", "assistant": "gpt", "human": "human", "gpt": "gpt", "system": "system"}
ROLE_ALIASES |= {"bot": "gpt", "model": "gpt", "chatgpt": "gpt", "bing": "gpt", "bard": "gpt"}
ROLE_ALIASES |= {"tool": "function", "observation": "function", "developer": "system"}
# Keys of turns in other formats -> ours.
TURN_KEY_ALIASES = {"role": "from", "speaker": "from", "author": "from", "content": "value", "text": "value"}
TURN_KEY_ALIASES |= {"message": "value", "utterance": "value", "from": "from", "value": "value"}


# -- meta file ---------------------------------------------------------------------------------------------------------


def load_meta(path: str) -> dict[str, dict]:
    """Read a meta file: dataset name -> entry.

    The entries are validated later, by `validate_meta_entry`.

    Raises:
        ValueError: the file is missing, is not JSON or not an object of objects, or uses a name twice.
    """
    try:
        with open_regular_file(fetch_local_copy(path), MAX_JSON_BYTES) as file:
            content = file.read()
        refuse_lfs_pointer(path, content)
        meta = json.loads(content.decode("utf-8-sig"), object_pairs_hook=require_unique_keys)
    except OSError as error:
        raise ValueError(f"meta file {path} cannot be opened: {error.strerror or error}.") from error
    except RecursionError as error:
        raise ValueError(f"meta file {path} is invalid: its values are nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"meta file {path} is invalid: {str(error).rstrip('.')}.") from error
    if not isinstance(meta, dict) or not meta or not all(isinstance(entry, dict) for entry in meta.values()):
        raise ValueError(
            f'meta file {path} is invalid: expected {{"NAME": {{"root": ..., "annotation": ...}}, ...}}, '
            f"got {shorten(meta)}."
        )
    for name in meta:
        if not (0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()):
            raise ValueError(
                f"meta file {path} is invalid: the name {shorten(name)} must have 1 to {MAX_NAME_LENGTH} printable "
                "characters."
            )
    return meta


def is_trained(meta: dict) -> bool:
    """Return whether the dataset of a meta entry is trained, not evaluated."""
    return meta.get("split") not in (EVAL_SPLIT, BASE_ANSWERS_SPLIT)


def validate_meta_entry(ds_name: str, meta: dict) -> None:
    """Raise ValueError, naming the first problems, if a meta entry is invalid."""
    problems = [f"the key {key!r} is missing" for key in REQUIRED_META_KEYS if key not in meta]
    problems += [
        f"the key {shorten(key)} is not supported; supported are {', '.join(META_KEYS)}"
        for key in meta
        if key not in META_KEYS
    ][:3]
    problems += [
        f"{key} must be {expected}, got {shorten(meta[key])}"
        for key, (expected, is_valid) in META_KEYS.items()
        if key in meta and not is_valid(meta[key])
    ]
    if problems:
        raise ValueError(f"dataset {ds_name}: {'; '.join(problems)}.")


# -- records -----------------------------------------------------------------------------------------------------------


def validate_record_keys(record: dict, content_keys: Sequence[str], known_keys: tuple[str, ...]) -> None:
    """Raise UnusableSample if keys are missing, or unknown ones carry content.

    Other keys, such as `id` or `width`, are ignored.

    Args:
        content_keys: required keys; the first one is the record's text.
        known_keys: all keys that are used.
    """
    if record.get(content_keys[0]) in ABSENT_VALUES and (foreign := list_text_keys(record, known_keys)):
        raise UnusableSample(
            f"the key {content_keys[0]} is missing; {', '.join(foreign):.200} instead of {', '.join(content_keys)} "
            "are not supported: convert the record"
        )
    refuse_foreign_keys(record, known_keys)


def get_media(record: dict) -> tuple[str, list[str]]:
    """Return the kind of a record's media and their paths, unresolved.

    The kind is `image`, `video` or `text`. A null or empty value counts as absent.
    """
    given = [key for key in MEDIA_KINDS if key in record and record[key] not in ABSENT_VALUES]
    if record.get("clip") not in ABSENT_VALUES and not any(MEDIA_KINDS[key] == "video" for key in given):
        raise UnusableSample(f"it has clip, {shorten(record['clip'])}, but no video")
    if not given:
        return "text", []
    if len(given) > 1:
        raise UnusableSample(f"it has {' and '.join(given)}, expected only one of them: remove the others")
    [key] = given
    value, kind = record[key], MEDIA_KINDS[key]
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(is_path(path) and not CONTENT_IN_PATH.match(path) for path in paths):
        raise UnusableSample(
            f"{key} must be a path or a list of paths, not bytes or base64, nor JSON in a string, got {shorten(value)}"
        )
    if kind == "video" and len(paths) > 1:
        raise UnusableSample(f"{len(paths)} videos in one record are not supported, only one is: split the record")
    return kind, paths


def is_path(value: object) -> bool:
    """Return whether a value is a path that the operating system accepts.

    Lone surrogates, which have no encoding, and zero bytes are not accepted.
    """
    with suppress(UnicodeEncodeError):
        return isinstance(value, str) and 0 < len(os.fsencode(value)) <= MAX_PATH_BYTES and "\0" not in value
    return False


def get_turns(record: dict) -> list[dict[str, str]]:
    """Return the validated turns of a record, each with `from` and `value`."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UnusableSample(
            f"conversations must be a list with at least one turn, got {shorten(turns)}{_advise_on_list(turns)}"
        )
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in TURN_KEYS):
            raise UnusableSample(
                f'turn {number} must be {{"from": TEXT, "value": TEXT}}, got {shorten(turn)}{_advise_on_turn(turn)}'
            )
        refuse_foreign_turn_keys(turn, number)
        role, value = turn["from"], turn["value"]
        if role not in ROLES:
            alias = ROLE_ALIASES.get(role.strip().lower())
            advice = f": rename it to {alias}" if alias else ""
            raise UnusableSample(f"turn {number} is from {shorten(role)}; expected one of {', '.join(ROLES)}{advice}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            surrogate = value[error.start]
            raise UnusableSample(
                f"turn {number} ({role}) has a lone surrogate {surrogate!r} at character {error.start}, half of a "
                "character that was cut: remove it"
            ) from error
    return turns


def _advise_on_list(turns: object) -> str:
    """Say what to write instead of an invalid `conversations`; "" if that is clear."""
    if isinstance(turns, str) and turns.lstrip().startswith(("[", "{")):
        return ": it is JSON in a string, write the list itself"
    if isinstance(turns, dict):
        return ": write a list of objects, one for each turn"
    return ""


def _advise_on_turn(turn: object) -> str:
    """Say what to write instead of an invalid turn; "" if that is clear."""
    if isinstance(turn, list):
        return ": write an object for each turn, all turns of the record in one list"
    if not isinstance(turn, dict):
        return ""
    ours = {key: alias for key in turn if (alias := TURN_KEY_ALIASES.get(normalize_key(key)))}
    advice = [f"rename {key:.50} to {alias}" for key, alias in ours.items() if key != alias and alias not in turn]
    if any(normalize_key(key) in ROLE_ALIASES for key in turn):
        advice.append("write one turn for each role")
    values = {alias: turn[key] for key, alias in ours.items()}
    role = str(values.get("from")).strip().lower()
    if values.get("from") not in ROLES and role in ROLE_ALIASES:
        advice.append(f"write {ROLE_ALIASES[role]} for {role}")
    if isinstance(values.get("value"), list | dict):
        advice.append("write one text with <image> or <video>, and the paths into image or video of the record")
    elif isinstance(values.get("value"), int | float):
        advice.append("write the number as text, in quotes")
    return ": " + ", ".join(advice[:4]) if advice else ""


def require_placeholders(turns: Sequence[dict[str, str]], kind: str, num_images: int) -> None:
    """Require a placeholder per image or video in human turns, or none.

    A record without placeholders gets them by `insert_placeholders`. In a system turn they are text, if the human
    turns have all of them.

    Args:
        num_images: number of images, or of frames of the video.

    Raises:
        UnusableSample: another number of placeholders, or one in an answer.
    """
    num_media = {"image": num_images, "video": 1, "text": 0}[kind]
    for media, placeholder in PLACEHOLDERS.items():
        num_expected = num_media if media == kind else 0
        num_in_human = sum(turn["value"].count(placeholder) for turn in turns if turn["from"] in ROLES_WITH_IMAGES)
        if num_in_human not in (0, num_expected):
            raise UnusableSample(
                f"{num_in_human} {placeholder} in human turns for {num_expected} {media}{'s' * (num_expected != 1)}: "
                f"write one per {media}, or none; --keep_surplus_placeholders True keeps surplus ones as text"
            )
        roles_with_text = (*ROLES_WITH_IMAGES, "system") if num_in_human else ROLES_WITH_IMAGES
        for number, turn in enumerate(turns, start=1):
            if placeholder in turn["value"] and turn["from"] not in roles_with_text:
                raise UnusableSample(
                    f"turn {number} ({turn['from']}) contains {placeholder}, which belongs in human turns: move or "
                    "remove it; --keep_surplus_placeholders True keeps it as text"
                )


def insert_placeholders(turns: list[dict[str, str]], kind: str, num_images: int) -> list[dict[str, str]]:
    """Insert the `<image>` placeholders of images or frames into human turns.

    If no human turn has a placeholder, the first one gets them before its text: one `<image>` per image, or one
    `<video>`. Then `<video>` is replaced by `Frame-1: <image>`, `Frame-2: <image>`, ... A wrong number of
    placeholders is reported by `require_placeholders`.

    Args:
        num_images: number of images, or of frames of the video.
    """
    if kind == "text":
        return turns
    placeholder = PLACEHOLDERS[kind]
    human_turns = [i for i, turn in enumerate(turns) if turn["from"] in ROLES_WITH_IMAGES]
    if not human_turns:
        raise UnusableSample(f"it has {num_images} images or frames but no human turn to insert them into")
    values = [turn["value"] for turn in turns]
    if not any(placeholder in values[i] for i in human_turns):
        first = human_turns[0]
        values[first] = f"{placeholder}\n" * (num_images if kind == "image" else 1) + values[first]
    if kind == "video":
        frames = "".join(f"Frame-{number}: <image>\n" for number in range(1, num_images + 1))
        first = next(i for i in human_turns if placeholder in values[i])
        values[first] = re.sub(f"{placeholder}\n?", frames, values[first], count=1)
    return [{**turn, "value": value} for turn, value in zip(turns, values, strict=True)]
