"""What users write: an entry of a meta file, a record of an annotation file. Read, checked, put into one form.

Below `dataset.py`, which turns a record into a Sample; nothing here opens a picture.
"""

import json
import os
import re
from contextlib import suppress

from internvl.constants import UnusableSample
from internvl.data.file_io import fetch_local_copy

# Key of a meta entry: what it must be, in words and as a check. `length` is for human readers.
META_KEYS = {
    "root": ("a path", lambda value: isinstance(value, str)),
    "annotation": ("a path", lambda value: isinstance(value, str)),
    "repeat_time": ("a positive number", lambda value: type(value) in (int, float) and value > 0),
    "data_augment": ("true or false", lambda value: isinstance(value, bool)),
    "max_dynamic_patch": ("a positive whole number", lambda value: type(value) is int and value > 0),
    "length": ("anything", lambda value: True),
}
PLACEHOLDERS = {"image": "<image>", "video": "<video>"}


def load_meta(path: str) -> dict[str, dict]:
    """Read a meta file: data set name -> its entry, which `LazySupervisedDataset` checks.

    Raises:
        ValueError: not there, not JSON, not an object of objects, or two data sets of one name.
    """

    def unique(pairs: list[tuple]) -> dict:
        twice = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
        if twice:
            raise ValueError(f"the name {twice.pop()!r} is used twice")
        return dict(pairs)

    try:
        with open(fetch_local_copy(path), encoding="utf-8") as file:
            meta = json.load(file, object_pairs_hook=unique)
    except OSError as error:
        raise ValueError(f"meta file {path} cannot be opened: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"meta file {path} cannot be used: {error}.") from error
    if not isinstance(meta, dict) or not meta or not all(isinstance(entry, dict) for entry in meta.values()):
        raise ValueError(f'meta file {path} must look like {{"NAME": {{"root": ..., "annotation": ...}}, ...}}.')
    return meta


def validate_meta_entry(ds_name: str, meta: dict) -> None:
    """Refuse a meta entry that cannot be used; ValueError in one sentence."""
    problems = [f"the key {key!r} is missing" for key in ("root", "annotation") if key not in meta]
    problems += [
        f"the key {key!r} is not known; known are {', '.join(META_KEYS)}" for key in meta if key not in META_KEYS
    ]
    problems += [
        f"{key} must be {what}, not {meta[key]!r}"
        for key, (what, fits) in META_KEYS.items()
        if key in meta and not fits(meta[key])
    ]
    if problems:
        raise ValueError(f"data set {ds_name}: {'; '.join(problems)}.")


def media_paths(record: dict) -> tuple[str, list[str]]:
    """What a record shows, `image`, `video` or `text`, and the paths as written. Empty or null means absent."""
    for kind in ("image", "video"):
        value = record.get(kind)
        if value:
            paths = [value] if isinstance(value, str) else value
            if not isinstance(paths, list) or not all(map(_is_path, paths)):
                raise UnusableSample(f"{kind} is {value!r}, not a path or a list of paths")
            if kind == "video" and len(paths) > 1:
                raise UnusableSample(f"it has {len(paths)} videos; one is supported")
            return kind, paths
    return "text", []


def _is_path(value) -> bool:
    """Whether a value can be a path at all: half a surrogate pair or a zero byte in it cannot be said to a system."""
    with suppress(UnicodeEncodeError):
        return isinstance(value, str) and bool(value) and b"\0" not in os.fsencode(value)
    return False


def read_turns(record: dict) -> list[dict[str, str]]:
    """The conversation of a record: turns with the strings `from` and `value`."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UnusableSample(f"conversations must be a list with at least one turn, not {turns!r:.80}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise UnusableSample(f'turn {number} must be {{"from": TEXT, "value": TEXT}}, not {turn!r:.80}')
    return turns


def insert_placeholders(turns: list[dict[str, str]], kind: str, num_pictures: int) -> list[dict[str, str]]:
    """Make sure that `<image>` stands in the human turns where the pictures go.

    If there is no `<image>` (`<video>`) at all, one per picture (one) is put before the first human turn. `<video>`
    becomes `Frame-1: <image>`, `Frame-2: <image>`, ... Wrong numbers are left for `tokenize_turns` to refuse.
    """
    if kind == "text":
        return turns
    marker = PLACEHOLDERS[kind]
    humans = [i for i, turn in enumerate(turns) if turn["from"] in ("human", "pretrain")]
    if not humans:
        raise UnusableSample(f"it has {num_pictures} pictures but no human turn to put them in")
    values = [turn["value"] for turn in turns]
    if not any(marker in values[i] for i in humans):
        values[humans[0]] = f"{marker}\n" * (num_pictures if kind == "image" else 1) + values[humans[0]]
    if kind == "video":
        frames = "".join(f"Frame-{n}: <image>\n" for n in range(1, num_pictures + 1))
        first = next(i for i in humans if marker in values[i])
        values[first] = re.sub(f"{marker}\n?", frames, values[first], count=1)
    return [{**turn, "value": value} for turn, value in zip(turns, values, strict=True)]
