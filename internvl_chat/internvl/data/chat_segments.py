"""Split the turns of a record into segments with and without loss.

The segments, joined, are the template's prompt. An answer and its end marker have loss. The system message, role
headers, questions and the line break after an end marker have none. `TEMPLATE_RULES` has the training rules that do
not follow from a template's text. `chat_tokenization.py` tokenizes the segments.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from types import MappingProxyType
from typing import NamedTuple

from internvl.constants import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, UnusableSample, shorten
from internvl.conversation import Conversation, get_conv_template

IMAGE_PLACEHOLDER = "<image>"
ROLES_WITH_IMAGES = ("human", "pretrain")  # in other roles `<image>` is text
IMAGE_TOKENS = [IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN]


class Segment(NamedTuple):
    """A piece of the prompt whose tokens all have loss, or none."""

    text: str
    has_loss: bool


class TemplateRules(NamedTuple):
    """Training rules of a template that do not follow from its text."""

    # True: each message is tokenized separately, even if it is empty, and roles may come in any order. False: the
    # conversation is tokenized as one string. It starts with the first human turn, turns alternate, and an empty
    # message leaves an open slot without an end marker.
    tokenize_per_message: bool = False
    strip_values: bool = False
    extra_headers: Mapping[str, str] = MappingProxyType({})  # role other than human and gpt -> header
    format_answer: Callable[[str], str] = str  # value of a gpt turn -> text that the model learns to write
    answer_end_marker: str | None = None  # replaces the template's
    pad_to_max_length: bool = True  # in `preprocess`, as in upstream's function for the template


def _format_final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}"


def _format_analysis_and_final(text: str) -> str:
    """Write `<think>A</think>B` as gpt-oss's analysis and final channels."""
    match = re.fullmatch("(.*?)<think>(.*)</think>(.*)", text, re.DOTALL)
    if not match:
        return _format_final(text)
    thoughts, answer = (match[1] + match[2]).strip(), match[3].strip()
    return f"<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant{_format_final(answer)}"


GPT_OSS_RULES = TemplateRules(
    tokenize_per_message=True,
    extra_headers={"function": "<|start|>tool<|message|>"},
    format_answer=_format_final,
    pad_to_max_length=False,
)
GPT_OSS_THINK_RULES = GPT_OSS_RULES._replace(format_answer=_format_analysis_and_final, answer_end_marker="<|return|>")
# For a record whose only turn is from `pretrain`: plain text without a template, all of it with loss.
PRETRAIN_RULES = TemplateRules(pad_to_max_length=False)
TEMPLATE_RULES = {
    "internvl2_5": TemplateRules(tokenize_per_message=True),
    "internlm2-chat": TemplateRules(strip_values=True),
    "internvl3_5_gpt_oss": GPT_OSS_RULES,
}


def get_template_rules(template_name: str, turns: Sequence[dict]) -> TemplateRules:
    """Return the rules for a record with these turns."""
    is_pretrain = bool(turns) and turns[0].get("from") == "pretrain"
    return PRETRAIN_RULES if is_pretrain else TEMPLATE_RULES.get(template_name, TemplateRules())


def split_into_segments(
    template_name: str, turns: Sequence[dict], num_images: int, rules: TemplateRules
) -> list[list[Segment]]:
    """Split a conversation into lists of segments.

    Each list is to be tokenized as one string. Each image is represented by `IMAGE_TOKENS`, in order.

    Raises:
        UnusableSample: see `tokenize_turns`.
    """
    if rules is PRETRAIN_RULES:
        return _split_pretrain_text(turns, num_images)
    conversation = get_conv_template(template_name)
    headers = {**dict(zip(("human", "gpt"), conversation.roles, strict=True)), **rules.extra_headers}
    messages = _validate_turns(turns, headers)
    if messages[0][0] == "system":
        conversation.set_system_message(messages[0][1])
        messages = messages[1:]
    if not rules.tokenize_per_message:
        messages = _require_alternating_roles(messages)
    if rules.strip_values:
        messages = [(role, text.strip()) for role, text in messages]
    conversation.messages = [[headers[role], text] for role, text in _insert_image_tokens(messages, num_images)]
    rendered = list(_render_messages(conversation, rules))
    return rendered if rules.tokenize_per_message else [[segment for message in rendered for segment in message]]


def _split_pretrain_text(turns: Sequence[dict], num_images: int) -> list[list[Segment]]:
    if len(turns) > 1:
        raise UnusableSample(f"a record with a turn from 'pretrain' must have exactly one turn, got {len(turns)}")
    [(_, text)] = _insert_image_tokens(_validate_turns(turns, {"pretrain": ""}), num_images)
    return [[Segment(text, True)]]


def _validate_turns(turns: Sequence[dict], headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the turns as (role, text); raises UnusableSample."""
    if not turns:
        raise UnusableSample("the conversation has no turns")
    for number, turn in enumerate(turns, start=1):
        role, value = turn.get("from"), turn.get("value")
        if role not in headers and (role != "system" or number > 1):
            raise UnusableSample(
                f"turn {number} is from {shorten(role)}; expected {' or '.join(headers)}, or system in turn 1"
            )
        if not isinstance(value, str):
            raise UnusableSample(f"the value of turn {number} ({role}) must be a string, got {shorten(value)}")
        if IMG_CONTEXT_TOKEN in value:
            raise UnusableSample(f"turn {number} ({role}) contains {IMG_CONTEXT_TOKEN}, which is reserved for images")
    return [(turn["from"], turn["value"]) for turn in turns]


def _require_alternating_roles(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the turns from the first human one on.

    Raises:
        UnusableSample: human and gpt do not alternate.
    """
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    for (role, _), expected in zip(turns, cycle(("human", "gpt")), strict=False):
        if role != expected:
            raise UnusableSample(
                f"this template requires alternating human and gpt turns, got two from {role} in succession"
            )
    return turns


def _insert_image_tokens(turns: list[tuple[str, str]], num_images: int) -> list[tuple[str, str]]:
    """Replace the first `num_images` placeholders in human turns; surplus ones stay text."""
    num_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role in ROLES_WITH_IMAGES)
    if num_placeholders < num_images:
        raise UnusableSample(f"{num_placeholders} {IMAGE_PLACEHOLDER} in human turns for {num_images} images")
    # One context token per image. It is repeated after tokenization, because tokenizing thousands of them takes time.
    images = iter(["".join(IMAGE_TOKENS)] * num_images)

    def replace_placeholders(text: str) -> str:
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        return first + "".join(next(images, IMAGE_PLACEHOLDER) + piece for piece in rest)

    return [(role, replace_placeholders(text) if role in ROLES_WITH_IMAGES else text) for role, text in turns]


def _render_messages(conversation: Conversation, rules: TemplateRules) -> Iterable[list[Segment]]:
    """Yield the segments of the system message, then of each message.

    Order and text are those of `Conversation.get_prompt`.
    """
    style = conversation.style
    yield [Segment(style.prefix(conversation), False)]
    for index, (header, text) in enumerate(conversation.messages):
        if not text and not rules.tokenize_per_message:
            yield [Segment(style.open_slot(conversation, index, header), False)]
            continue
        is_answer = header == conversation.roles[1]
        after = style.after(conversation, index)
        end_marker = after.rstrip()
        line_break = after[len(end_marker) :]
        if is_answer:
            text, end_marker = rules.format_answer(text), rules.answer_end_marker or end_marker
        yield [
            Segment(style.before(conversation, index, header), False),
            Segment(style.clean(text) + end_marker, is_answer),
            Segment(line_break, False),
        ]
