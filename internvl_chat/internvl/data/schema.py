"""Schema of meta files and annotation records.

Reads, validates and normalizes them. No image is opened here.
"""

import json
import os
import re
from contextlib import suppress

from internvl.constants import UnusableSample
from internvl.data.file_io import fetch_local_copy

# Key of a meta entry -> its valid values, in words and as a check. `length` is informational and not used.
META_KEYS = {
    "root": ("a path", lambda value: isinstance(value, str)),
    "annotation": ("a path", lambda value: isinstance(value, str)),
    "repeat_time": ("a positive number", lambda value: type(value) in (int, float) and value > 0),
    "data_augment": ("true or false", lambda value: isinstance(value, bool)),
    "max_dynamic_patch": ("a positive integer", lambda value: type(value) is int and value > 0),
    "length": ("anything", lambda value: True),
}
REQUIRED_META_KEYS = ("root", "annotation")
MEDIA_PLACEHOLDERS = {"image": "<image>", "video": "<video>"}


# -- meta file ---------------------------------------------------------------------------------------------------------


def load_meta(path: str) -> dict[str, dict]:
    """Read a meta file: dataset name -> entry.

    The entries are validated later, by `validate_meta_entry`.

    Raises:
        ValueError: the file is missing, is not JSON or not an object of objects, or uses a name twice.
    """

    def require_unique_keys(pairs: list[tuple]) -> dict:
        duplicates = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
        if duplicates:
            raise ValueError(f"the name {duplicates.pop()!r} is used twice")
        return dict(pairs)

    try:
        with open(fetch_local_copy(path), encoding="utf-8") as file:
            meta = json.load(file, object_pairs_hook=require_unique_keys)
    except OSError as error:
        raise ValueError(f"meta file {path} cannot be opened: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"meta file {path} is invalid: {error}.") from error
    if not isinstance(meta, dict) or not meta or not all(isinstance(entry, dict) for entry in meta.values()):
        raise ValueError(f'meta file {path} is invalid: expected {{"NAME": {{"root": ..., "annotation": ...}}, ...}}.')
    return meta


def validate_meta_entry(ds_name: str, meta: dict) -> None:
    """Raise ValueError, naming all problems, if a meta entry is invalid."""
    problems = [f"the key {key!r} is missing" for key in REQUIRED_META_KEYS if key not in meta]
    problems += [
        f"the key {key!r} is not supported; supported are {', '.join(META_KEYS)}"
        for key in meta
        if key not in META_KEYS
    ]
    problems += [
        f"{key} must be {expected}, got {meta[key]!r}"
        for key, (expected, is_valid) in META_KEYS.items()
        if key in meta and not is_valid(meta[key])
    ]
    if problems:
        raise ValueError(f"dataset {ds_name}: {'; '.join(problems)}.")


# -- records -----------------------------------------------------------------------------------------------------------


def get_media(record: dict) -> tuple[str, list[str]]:
    """Return the kind of a record's media and their paths, unresolved.

    The kind is `image`, `video` or `text`; an empty or null value counts as absent.
    """
    for kind in ("image", "video"):
        value = record.get(kind)
        if value:
            paths = [value] if isinstance(value, str) else value
            if not isinstance(paths, list) or not all(map(_is_path, paths)):
                raise UnusableSample(f"{kind} must be a path or a list of paths, got {value!r}")
            if kind == "video" and len(paths) > 1:
                raise UnusableSample(f"{len(paths)} videos in one record are not supported, only one is")
            return kind, paths
    return "text", []


def _is_path(value) -> bool:
    """Return whether a value is a path that the operating system accepts.

    Lone surrogates, which have no encoding, and zero bytes are not accepted.
    """
    with suppress(UnicodeEncodeError):
        return isinstance(value, str) and bool(value) and b"\0" not in os.fsencode(value)
    return False


def get_turns(record: dict) -> list[dict[str, str]]:
    """Return the validated turns of a record, each with `from` and `value`."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UnusableSample(f"conversations must be a list with at least one turn, got {turns!r:.80}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise UnusableSample(f'turn {number} must be {{"from": TEXT, "value": TEXT}}, got {turn!r:.80}')
    return turns


def insert_placeholders(turns: list[dict[str, str]], kind: str, num_images: int) -> list[dict[str, str]]:
    """Insert the `<image>` placeholders of images or frames into human turns.

    If no human turn has a placeholder, the first one gets them before its text: one `<image>` per image, or one
    `<video>`. Then `<video>` is replaced by `Frame-1: <image>`, `Frame-2: <image>`, ... A wrong number of
    placeholders is reported later, by `tokenize_turns`.

    Args:
        num_images: number of images, or of frames of the video.
    """
    if kind == "text":
        return turns
    placeholder = MEDIA_PLACEHOLDERS[kind]
    human_turns = [i for i, turn in enumerate(turns) if turn["from"] in ("human", "pretrain")]
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
