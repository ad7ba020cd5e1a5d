"""Turns of a record -> segments `(text, trained?)`, in the order and with the text that the model sees.

An answer and its end marker are trained, everything else (system message, role headers, questions, the line break
behind the marker) is only read. What sets a template apart beyond its text is a row of `TEMPLATE_RULES`.
`preprocess.py`
tokenises the segments.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from internvl.constants import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, UnusableSample
from internvl.conversation import Conversation, get_conv_template

IMAGE_PLACEHOLDER = "<image>"
ROLES_WITH_IMAGES = ("human", "pretrain")  # roles whose placeholders stand for images
IMAGE_TOKENS = [IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN]


class Segment(NamedTuple):
    text: str
    trained: bool


class TemplateRules(NamedTuple):
    """What a template's published checkpoints were trained with, beyond its text."""

    # Each message is tokenised by itself, complete even if empty, in any order of roles. Otherwise the conversation is
    # one string of alternating turns from the first human one, and an empty message leaves its slot open.
    turn_by_turn: bool = False
    strip: bool = False
    roles: Mapping[str, str] = MappingProxyType({})  # headers of roles beside human and gpt
    answer: Callable[[str], str] = str  # what the model is to write for the value of a gpt turn
    end_marker: str | None = None  # of every answer, instead of the template's
    padded: bool = True  # by `preprocess`, as upstream's function of this row does


def _final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}"


def _analysis_then_final(text: str) -> str:
    """`<think>A</think>B` on the channels that gpt-oss has for thoughts and answers."""
    match = re.fullmatch("(.*?)<think>(.*)</think>(.*)", text, re.DOTALL)
    if not match:
        return _final(text)
    thoughts, answer = (match[1] + match[2]).strip(), match[3].strip()
    return f"<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant{_final(answer)}"


GPT_OSS = TemplateRules(turn_by_turn=True, roles={"function": "<|start|>tool<|message|>"}, answer=_final, padded=False)
WITH_THINK = GPT_OSS._replace(answer=_analysis_then_final, end_marker="<|return|>")
PRETRAIN = TemplateRules(padded=False)  # of a record whose one turn is from `pretrain`: plain text, all of it trained
TEMPLATE_RULES = {
    "internvl2_5": TemplateRules(turn_by_turn=True),
    "internlm2-chat": TemplateRules(strip=True),
    "internvl3_5_gpt_oss": GPT_OSS,
}


def rules_for_record(template_name: str, turns: Sequence[dict]) -> TemplateRules:
    """The row for a record of this template."""
    pretrain = bool(turns) and turns[0].get("from") == "pretrain"
    return PRETRAIN if pretrain else TEMPLATE_RULES.get(template_name, TemplateRules())


def split_into_segments(
    template_name: str, turns: Sequence[dict], num_images: int, rules: TemplateRules
) -> list[list[Segment]]:
    """Lists of segments, each to be tokenised as one string; an image is one of each of `IMAGE_TOKENS`.

    Raises:
        BadSample: as `tokenize_turns`.
    """
    if rules is PRETRAIN:
        return _plain_text(turns, num_images)
    conversation = get_conv_template(template_name)
    headers = {**dict(zip(("human", "gpt"), conversation.roles, strict=True)), **rules.roles}
    turns = _checked(turns, headers)
    if turns[0][0] == "system":
        conversation.set_system_message(turns[0][1])
        turns = turns[1:]
    if not rules.turn_by_turn:
        turns = _alternating(turns)
    if rules.strip:
        turns = [(role, text.strip()) for role, text in turns]
    conversation.messages = [[headers[role], text] for role, text in _insert_images(turns, num_images)]
    messages = list(_messages(conversation, rules))
    return messages if rules.turn_by_turn else [[segment for message in messages for segment in message]]


def _plain_text(turns: Sequence[dict], num_images: int) -> list[list[Segment]]:
    if len(turns) > 1:
        raise UnusableSample(f"a record that begins with a turn from 'pretrain' has this one turn, not {len(turns)}")
    [(_, text)] = _insert_images(_checked(turns, {"pretrain": ""}), num_images)
    return [[Segment(text, True)]]


def _checked(turns: Sequence[dict], headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The turns as (role, text)."""
    if not turns:
        raise UnusableSample("the conversation has no turns")
    roles = [turn.get("from") for turn in turns]
    for number, (role, turn) in enumerate(zip(roles, turns, strict=True)):
        if role not in headers and (role != "system" or number > 0):
            raise UnusableSample(
                f"turn {number} is from {role!r}; expected {' or '.join(headers)}, or system in turn 0"
            )
        if not isinstance(turn.get("value"), str):
            raise UnusableSample(f"the value of turn {number} ({role}) is {turn.get('value')!r}, not a text")
        if IMG_CONTEXT_TOKEN in turn["value"]:
            raise UnusableSample(
                f"turn {number} ({role}) itself writes {IMG_CONTEXT_TOKEN}, which only stands for an image"
            )
    return [(role, turn["value"]) for role, turn in zip(roles, turns, strict=True)]


def _alternating(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns from the first human one on, if human and gpt take turns."""
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    roles = [role for role, _ in turns]
    if roles != ["human", "gpt"] * (len(roles) // 2) + ["human"] * (len(roles) % 2):
        raise UnusableSample(f"this template needs human and gpt in turns, got {', '.join(roles)}")
    return turns


def _insert_images(turns: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The first `count` placeholders of human turns replaced by image tokens; surplus ones stay text."""
    found = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role in ROLES_WITH_IMAGES)
    if found < count:
        raise UnusableSample(f"{found} {IMAGE_PLACEHOLDER} in human turns for {count} images")
    # One token stands for all those of an image until the text is tokenised: thousands would cost milliseconds.
    images = iter(["".join(IMAGE_TOKENS)] * count)

    def fill(text: str) -> str:
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        return first + "".join(next(images, IMAGE_PLACEHOLDER) + part for part in rest)

    return [(role, fill(text) if role in ROLES_WITH_IMAGES else text) for role, text in turns]


def _messages(conversation: Conversation, rules: TemplateRules) -> Iterable[list[Segment]]:
    """Segments of the system message and of each message, in the order and with the text of the template's prompt."""
    style = conversation.style
    yield [Segment(style.prefix(conversation), False)]
    for index, (header, text) in enumerate(conversation.messages):
        if not text and not rules.turn_by_turn:
            yield [Segment(style.open(conversation, index, header), False)]
            continue
        answer = header == conversation.roles[1]
        after = style.after(conversation, index)
        end_marker = after.rstrip()
        line_break = after[len(end_marker) :]
        if answer:
            text, end_marker = rules.answer(text), rules.end_marker or end_marker
        yield [
            Segment(style.before(conversation, index, header), False),
            Segment(style.clean(text) + end_marker, answer),
            Segment(line_break, False),
        ]
