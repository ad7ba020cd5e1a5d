"""Schema of meta files and annotation records.

Reads, validates and normalizes them. No image is opened here.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from internvl.constants import MAX_TILES_PER_IMAGE, UnusableSample, shorten
from internvl.data.chat_segments import IMAGE_PLACEHOLDER, ROLES_WITH_IMAGES
from internvl.data.file_io import fetch_local_copy
from internvl.regular_files import MAX_JSON_BYTES, open_regular_file, refuse_lfs_pointer

MAX_NAME_LENGTH = 255
MAX_PATH_BYTES = 4096  # PATH_MAX of Linux

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
}
REQUIRED_META_KEYS = ("root", "annotation")

# Key of a record -> kind of its media. The plurals are the names in other frameworks.
MEDIA_KINDS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": "<video>"}
ABSENT_VALUES = (None, "", [], {})

ROLES = ("system", "human", "gpt", "pretrain", "function")
# Role in other frameworks, in lower case -> ours.
ROLE_ALIASES = {"user": "human", "assistant": "gpt", "human": "human", "gpt": "gpt", "system": "system"}
ROLE_ALIASES |= {"bot": "gpt", "model": "gpt", "chatgpt": "gpt", "bing": "gpt", "bard": "gpt"}
ROLE_ALIASES |= {"tool": "function", "observation": "function", "developer": "system"}

# Keys with which other frameworks weigh or mask an answer -> the value without effect.
WEIGHT_KEYS = {"loss": 1, "loss_weight": 1, "loss_scale": 1, "weight": 1, "train": 1, "mask": 0}
WEIGHT_ADVICE = "every answer has loss: remove the key, and the turns or records that shall not be trained"
# Keys that change the meaning of a record or a turn in other frameworks -> what to do.
UNSUPPORTED_KEYS = dict.fromkeys(WEIGHT_KEYS, WEIGHT_ADVICE) | {
    "messages": "write them as conversations, with from and value instead of role and content",
    "system": "make it the first turn, from 'system' (in a preference pair: system_prompt)",
    "tools": "describe the tools in a first turn from 'system'",
    "tool_calls": "write the calls into the value of the turn",
    "objects": "write boxes into the text: <ref>name</ref><box>[[x1, y1, x2, y2]]</box>, from 0 to 1000",
    "audio": "audio is not supported",
    "audios": "audio is not supported",
}
# Keys in which other formats have the text. They are reported only in a record that lacks ours.
FOREIGN_TEXT_KEYS = """
    instruction input output query response history prompt completion question answer chosen rejected conversation
    conversations dialogue text texts caption
""".split()


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
        meta = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_require_unique_keys)
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


def _require_unique_keys(pairs: list[tuple]) -> dict:
    """Make a dict of a JSON object; json would keep the last of equal keys."""
    if len(unique := dict(pairs)) < len(pairs):
        [(name, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the name {shorten(name)} is used twice")
    return unique


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


def validate_record_keys(record: dict, content_keys: Sequence[str]) -> None:
    """Raise UnusableSample if keys are missing, or would change the meaning.

    Other keys, such as `id` or `width`, are ignored.

    Args:
        content_keys: required keys; the first one is the record's text.
    """
    _refuse_unsupported_keys(record, "it")
    foreign = [key for key in FOREIGN_TEXT_KEYS if key in record and key not in content_keys]
    if record.get(content_keys[0]) in ABSENT_VALUES and foreign:
        raise UnusableSample(
            f"the key {content_keys[0]} is missing; {', '.join(foreign)} instead of {', '.join(content_keys)} "
            "are not supported: convert the record"
        )


def _refuse_unsupported_keys(values: dict, owner: str) -> None:
    for key, value in values.items():
        has_effect = value not in ABSENT_VALUES and not (key in WEIGHT_KEYS and value == WEIGHT_KEYS[key])
        if key not in UNSUPPORTED_KEYS or not has_effect:
            continue
        raise UnusableSample(
            f"{owner} has the key {key}, {shorten(value)}, which is not supported: {UNSUPPORTED_KEYS[key]}"
        )


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
    if not isinstance(paths, list) or not all(map(is_path, paths)):
        raise UnusableSample(f"{key} must be a path or a list of paths, not bytes or base64, got {shorten(value)}")
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
        raise UnusableSample(f"conversations must be a list with at least one turn, got {shorten(turns)}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise UnusableSample(f'turn {number} must be {{"from": TEXT, "value": TEXT}}, got {shorten(turn)}')
        _refuse_unsupported_keys(turn, f"turn {number}")
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
