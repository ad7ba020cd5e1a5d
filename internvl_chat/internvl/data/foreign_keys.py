"""Keys of other formats in records and turns: what they mean there, and what to write instead.

Most keys that a record has beside ours describe the sample (`id`, `source`, `width`) and are ignored. Those listed here
carry content, or change which tokens have loss. Without them, training would silently differ from what the record says.
"""

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import NamedTuple

from internvl.constants import UnusableSample, shorten

ABSENT_VALUES = (None, "", [], {})
# Key of a record -> kind of its media. The plurals are the names in other frameworks.
MEDIA_KINDS = {"image": "image", "images": "image", "video": "video", "videos": "video"}
MEDIA_KEYS = (*MEDIA_KINDS, "clip")
TURN_KEYS = ("from", "value")


class ForeignKey(NamedTuple):
    """What to do instead of using a key, and which of its values have an effect.

    A key with a `media_kind` describes the media of a record that has some of this kind: it is where they come from.
    """

    advice: str
    has_effect: Callable[[object], bool]
    media_kind: str | None = None


def is_present(value: object) -> bool:
    return value not in ABSENT_VALUES


def is_content(value: object) -> bool:
    """Return whether a value is a text, list or object.

    A number only describes a sample: `"messages": 4`.
    """
    return bool(value.strip() if isinstance(value, str) else value) and isinstance(value, str | list | dict)


def holds(*flags: object) -> Callable[[object], bool]:
    """Return a test for these flags, or a list with one of them.

    Texts and objects under the same keys describe a sample: `"mask": "masks/7.png"`.
    """
    return lambda value: any(flag in flags for flag in (value if isinstance(value, list) else [value]))


def is_weight(value: object) -> bool:
    """Return whether a value is a number other than 1, or a list with one."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(number, int | float) and number != 1 for number in values)


def is_false(value: object) -> bool:
    return value is False


def normalize_key(key: str) -> str:
    """Return the letters of a key in lower case: `Image_Path-1` -> `imagepath`."""
    return "".join(filter(str.isalpha, key.lower()))


IMAGE_ADVICE = "write paths into the key image"
VIDEO_ADVICE = "write the path into the key video"
WEIGHT_ADVICE = "every answer has loss: remove the key, and the turns or records that shall not be trained"
CLIP_ADVICE = "write the seconds as clip: [start, end]"
# Names of keys, in any case, with or without underscores and numbers; then the fields of `ForeignKey`.
FOREIGN_KEY_ROWS: tuple[tuple, ...] = (
    # texts
    ("messages", "write them as conversations, with from and value instead of role and content", is_content),
    ("conversation dialog dialogs dialogue dialogues turns chat", "write the turns into conversations", is_content),
    ("history", "write the earlier turns into conversations", is_content),
    ("instruction instructions", "write it into a turn from 'human'", is_content),
    (
        "system sys system_prompt sys_prompt system_message system_instruction meta_instruction developer",
        "make it the first turn, from 'system' (in a preference pair: system_prompt)",
        is_content,
    ),
    (
        "reasoning_content thinking thinking_content",
        "write it into the value of the answer, as <think>...</think>",
        is_content,
    ),
    (
        """chosen rejected chosen_response rejected_response rejected_responses chosen_answer rejected_answer
        rejected_messages chosen_messages rejected_conversations chosen_conversations""",
        "preference pairs are trained by internvl_chat_mpo.py, with the keys question, chosen and rejected",
        is_content,
    ),
    ("rejected_image rejected_images rejected_video", "both answers have the same images: remove it", is_content),
    ("tool tools functions", "describe the tools in a first turn from 'system'", is_content),
    ("tool_call tool_calls function_call function_calls", "write the calls into the value of the turn", is_content),
    ("objects", "write boxes into the text: <ref>name</ref><box>[[x1, y1, x2, y2]]</box>, from 0 to 1000", is_content),
    # media
    (
        """img imgs image_path image_paths image_file image_files image_url image_urls image_list img_path img_paths
        img_url img_urls img_file img_list images_path images_url picture pictures pic pics photo photos""",
        IMAGE_ADVICE,
        is_content,
        "image",
    ),
    (
        "image_bytes image_base image_data img_base img_bytes img_data",  # image_base64, without its digits
        "write the image to a file, and its path into the key image",
        is_content,
        "image",
    ),
    (
        "video_path video_paths video_file video_files video_url video_urls video_list videos_path videos_url",
        VIDEO_ADVICE,
        is_content,
        "video",
    ),
    ("frames frame_paths video_frames", "put the frames into a folder, and its path into the key video", is_content),
    ("clips", "one clip per record is supported: split the record, and write clip: [start, end]", is_content),
    ("video_start video_end", CLIP_ADVICE, is_present),
    ("audio audios audio_path audio_paths audio_url speech", "audio is not supported", is_content),
    # loss
    ("loss train is_train trainable", WEIGHT_ADVICE, holds(False)),
    ("loss_weight loss_scale weight weights", WEIGHT_ADVICE, is_weight),
    ("mask masked loss_mask train_mask ignore skip", WEIGHT_ADVICE, holds(True)),
    ("label kto_tag", "the answer is marked as one that shall not be trained: remove the record", is_false),
)
FOREIGN_KEYS = {
    normalize_key(name): ForeignKey(*columns) for names, *columns in FOREIGN_KEY_ROWS for name in names.split()
}
# Keys that have the text in other formats, and describe a sample in ours. Where our text is missing they are named,
# otherwise `check_data` counts those whose text is in no turn.
TEXT_KEYS = frozenset(
    """instruction input output query response history prompt completion question answer chosen rejected conversation
    conversations dialogue text texts caption captions problem solution rationale reasoning thought context description
    target label options choices hint""".split()
)
# Keys that have the times of a clip in other formats, or describe a video that was cut already.
TIME_KEYS = frozenset("start end starttime endtime startsec endsec timestamp timestamps timerange segment".split())


@lru_cache
def list_foreign_keys(known_keys: tuple[str, ...]) -> dict[str, ForeignKey]:
    """Map normalized foreign keys and near misses of ours to advice."""
    advice = {key: f"use {key} instead" for key in known_keys}
    advice |= {key: f"use {key} instead, with one path or a list of all paths" for key in ("image", "images")}
    return FOREIGN_KEYS | {normalize_key(key): ForeignKey(advice[key], is_present) for key in known_keys}


FOREIGN_KEYS_OF_TURNS = (
    list_foreign_keys(TURN_KEYS)
    | dict.fromkeys(MEDIA_KEYS, ForeignKey("it belongs to the record, with <image> or <video> in the turn", is_present))
    | dict.fromkeys(("content", "text"), ForeignKey("the text of a turn is its value", is_content))
)


def refuse_foreign_keys(record: dict, known_keys: tuple[str, ...]) -> None:
    """Raise UnusableSample if a record has content in keys other than ours."""
    _refuse_foreign_keys("it", record, known_keys, list_foreign_keys(known_keys))


def refuse_foreign_turn_keys(turn: dict, number: int) -> None:
    """Raise UnusableSample if a turn has content in keys other than ours."""
    _refuse_foreign_keys(f"turn {number}", turn, TURN_KEYS, FOREIGN_KEYS_OF_TURNS)


def _refuse_foreign_keys(
    owner: str, values: dict, known_keys: tuple[str, ...], foreign_keys: dict[str, ForeignKey]
) -> None:
    kinds = {kind for key, kind in MEDIA_KINDS.items() if is_present(values.get(key))}
    for key, value in values.items():
        foreign = foreign_keys.get(normalize_key(key)) if key not in known_keys else None
        if foreign and foreign.media_kind not in kinds and foreign.has_effect(value):
            raise UnusableSample(
                f"{owner} has the key {key:.50}, {shorten(value)}, which is not supported: {foreign.advice}"
            )


def list_text_keys(record: dict, known_keys: tuple[str, ...]) -> list[str]:
    """List the keys of a record that have the text in other formats."""
    foreign_keys = TEXT_KEYS.difference(map(normalize_key, known_keys))
    return [key for key in record if normalize_key(key) in foreign_keys]


def list_unused_keys(record: dict, known_keys: tuple[str, ...], texts: Collection[str]) -> list[str]:
    """List keys whose content may be missing from the sample.

    They hold a text that is in none of `texts`, or times of a video without `clip`.
    """
    unused = [
        key
        for key in list_text_keys(record, known_keys)
        if is_content(value := record[key]) and not any(str(value).strip() in text for text in texts)
    ]
    has_uncut_video = any(is_present(record.get(key)) for key in ("video", "videos")) and not record.get("clip")
    times = [key for key, value in record.items() if normalize_key(key) in TIME_KEYS and is_present(value)]
    return unused + times * has_uncut_video
