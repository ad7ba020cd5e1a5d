"""Turns of a record -> (input_ids, labels).

The template cuts a conversation into segments `(text, trained?)`: an answer and its end marker are trained, everything
else (system message, role headers, questions, the line break behind the marker) is only read. The text is tokenised in
one piece where the template was trained so, and the tokenizer's offsets carry the cuts over to the tokens. One road for
all templates; `dataset.py` calls `tokenize_turns`, upstream's five functions are the same with truncation and padding.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..conversation import Conversation, get_conv_template
from .constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, BadSample

PLACEHOLDER = "<image>"


class Segment(NamedTuple):
    text: str
    trained: bool


class Rules(NamedTuple):
    """What a template's published checkpoints were trained with, beyond its text."""

    # Each message is tokenised by itself, complete even if empty, in any order of roles. Otherwise the conversation is
    # one string of alternating turns from the first human one, and an empty message leaves its slot open.
    turn_by_turn: bool = False
    strip: bool = False


RULES = {"internvl2_5": Rules(turn_by_turn=True), "internlm2-chat": Rules(strip=True)}


def tokenize_turns(
    template_name: str, turns: Sequence[dict], tokenizer, image_tokens: Sequence[int], text_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one conversation, neither truncated nor padded.

    Args:
        turns: the record's `conversations`: `{"from": "system" (first only) | "human" | "gpt", "value": text}`.
        tokenizer: a fast one; what it puts in front of a text by itself (a bos) stands once, in front of all.
        image_tokens: number of image tokens of each image; the j-th `<image>` in human turns becomes the j-th image.
        text_only: leave `<image>` as it is written.

    Returns:
        input_ids, labels: int64 (L,); labels are IGNORE_INDEX outside answers and their end markers.

    Raises:
        BadSample: no turns, an unknown role, a value that is no text, fewer placeholders than images.
        ValueError: the tokenizer lacks the image token.
    """
    rules = RULES.get(template_name, Rules())
    conversation = get_conv_template(template_name)
    turns = _checked(turns)
    if turns[0][0] == "system":
        conversation.set_system_message(turns[0][1])
        turns = turns[1:]
    if not rules.turn_by_turn:
        turns = _alternating(turns)
    if rules.strip:
        turns = [(role, text.strip()) for role, text in turns]
    image_tokens = () if text_only else image_tokens
    turns = _insert_images(turns, len(image_tokens))

    messages = list(_messages(conversation, turns, rules.turn_by_turn))
    if not rules.turn_by_turn:
        messages = [[segment for message in messages for segment in message]]
    bos = tokenizer("").input_ids
    pieces = [(bos, [IGNORE_INDEX] * len(bos)), *(_tokenize(tokenizer, message) for message in messages)]
    input_ids, labels = (np.concatenate(column).astype(np.int64) for column in zip(*pieces, strict=True))
    if image_tokens:
        repeats = _image_repeats(tokenizer, input_ids, image_tokens)
        input_ids, labels = np.repeat(input_ids, repeats), np.repeat(labels, repeats)
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def _checked(turns: Sequence[dict]) -> list[tuple[str, str]]:
    """The turns as (role, text)."""
    if not turns:
        raise BadSample("the conversation has no turns")
    roles = [turn.get("from") for turn in turns]
    for number, (role, turn) in enumerate(zip(roles, turns, strict=True)):
        if role not in ("system", "human", "gpt") or (role == "system" and number > 0):
            raise BadSample(f"turn {number} is from {role!r}; expected human or gpt, or system in turn 0")
        if not isinstance(turn.get("value"), str):
            raise BadSample(f"the value of turn {number} ({role}) is {turn.get('value')!r}, not a text")
        if IMG_CONTEXT_TOKEN in turn["value"]:
            raise BadSample(f"turn {number} ({role}) itself writes {IMG_CONTEXT_TOKEN}, which only stands for an image")
    return [(role, turn["value"]) for role, turn in zip(roles, turns, strict=True)]


def _alternating(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns from the first human one on, if human and gpt take turns."""
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    roles = [role for role, _ in turns]
    if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        raise BadSample(f"this template needs human and gpt in turns, got {', '.join(roles)}")
    return turns


def _insert_images(turns: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The first `count` placeholders of human turns replaced by image tokens; surplus ones stay text."""
    found = sum(text.count(PLACEHOLDER) for role, text in turns if role == "human")
    if found < count:
        raise BadSample(f"{found} {PLACEHOLDER} in human turns for {count} images")
    # One token stands for all those of an image until the text is tokenised: thousands would cost milliseconds.
    images = iter([IMG_START_TOKEN + IMG_CONTEXT_TOKEN + IMG_END_TOKEN] * count)

    def fill(text: str) -> str:
        first, *rest = text.split(PLACEHOLDER)
        return first + "".join(next(images, PLACEHOLDER) + part for part in rest)

    return [(role, fill(text) if role == "human" else text) for role, text in turns]


def _image_repeats(tokenizer, input_ids: np.ndarray, image_tokens: Sequence[int]) -> np.ndarray:
    """How often each id is to stand in the end: an image's token as often as the image needs, any other once."""
    places = input_ids == tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    if places.sum() != len(image_tokens):
        raise ValueError(f"the tokenizer does not know {IMG_CONTEXT_TOKEN} as one token; add it first")
    repeats = np.ones_like(input_ids)
    repeats[places] = image_tokens
    return repeats


def _messages(conversation: Conversation, turns: list[tuple[str, str]], keep_empty: bool) -> Iterable[list[Segment]]:
    """Segments of the system message and of each turn, in the order and with the text of the template's prompt."""
    style = conversation.style
    yield [Segment(style.prefix(conversation), False)]
    for index, (role, text) in enumerate(turns):
        answer = role == "gpt"
        header = conversation.roles[answer]
        if not text and not keep_empty:
            yield [Segment(style.open(conversation, index, header), False)]
            continue
        after = style.after(conversation, index)
        end_marker = after.rstrip()
        yield [
            Segment(style.before(conversation, index, header), False),
            Segment(style.clean(text) + end_marker, answer),
            Segment(after[len(end_marker) :], False),
        ]


def _tokenize(tokenizer, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of segments tokenised as one string; a token that reaches over a cut is not trained."""
    encoded = tokenizer(
        "".join(segment.text for segment in segments),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    input_ids = np.array(encoded.input_ids, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    if not any(segment.trained for segment in segments):
        return input_ids, labels
    starts, ends = np.array(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2).T
    # The space that some tokenizers put in front of a word claims the word's first character; it ends where it starts.
    inner_ends = np.minimum(ends, np.append(starts[1:], ends[-1:]))
    begin = 0
    for text, trained in segments:
        end = begin + len(text)
        if trained:
            # `ends > begin`: where offsets are trimmed of white space, a line break before the cut lies empty on it.
            inside = (starts >= begin) & (ends > begin) & (inner_ends <= end)
            labels[inside] = input_ids[inside]
        begin = end
    return input_ids, labels


def preprocess(
    template_name: str,
    sources: Sequence[Sequence[dict]],
    tokenizer,
    num_image_token_list: Sequence[int],
    text_only: bool = False,
    group_by_length: bool = False,
    use_packed_ds: bool = False,
    ds_name: str | None = None,
    num_image: int = 1,
) -> dict[str, torch.Tensor]:
    """Upstream's call: `tokenize_turns` of the one conversation in `sources`, cut at `tokenizer.model_max_length`.

    Returns:
        input_ids, labels, attention_mask: (1, L); padded on the right to `model_max_length` unless `group_by_length` or
        `use_packed_ds`.

    Raises:
        BadSample: as `tokenize_turns`. ValueError: not exactly one conversation.
    """
    if len(sources) != 1:
        raise ValueError(f"expected one conversation, got {len(sources)}")
    columns = tokenize_turns(template_name, sources[0], tokenizer, num_image_token_list[:num_image], text_only)
    longest = tokenizer.model_max_length
    input_ids, labels = (column[:longest] for column in columns)
    if not (group_by_length or use_packed_ds):
        missing = longest - len(input_ids)
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=tokenizer.pad_token_id)
        labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORE_INDEX)
    attention_mask = input_ids.ne(tokenizer.pad_token_id)
    return {"input_ids": input_ids[None], "labels": labels[None], "attention_mask": attention_mask[None]}


# The template, not the name of the function, decides.
preprocess_mpt = preprocess_internlm = preprocess_phi3 = preprocess_internvl2_5 = preprocess
