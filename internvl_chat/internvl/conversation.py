"""Conversation templates, which turn a dialogue into a prompt.

A template is an entry of `conv_templates`; how its parts are joined is an entry of `PROMPT_STYLES`. Inference renders a
dialogue with `Conversation.get_prompt`. Training renders the same entries as segments with and without loss, see
`data/chat_segments.py`. Names and texts are those of the published InternVL checkpoints.
"""

import dataclasses
from collections.abc import Callable, Sequence
from enum import IntEnum, auto
from typing import Any, NamedTuple


class SeparatorStyle(IntEnum):
    """Names of the ways to join roles, messages and separators."""

    ADD_COLON_SINGLE = auto()
    ADD_COLON_TWO = auto()
    ADD_COLON_SPACE_SINGLE = auto()
    NO_COLON_SINGLE = auto()
    NO_COLON_TWO = auto()
    ADD_NEW_LINE_SINGLE = auto()
    LLAMA2 = auto()
    CHATGLM = auto()
    CHATML = auto()
    CHATINTERN = auto()
    DOLLY = auto()
    RWKV = auto()
    PHOENIX = auto()
    ROBIN = auto()
    FALCON_CHAT = auto()
    CHATGLM3 = auto()
    INTERNVL_ZH = auto()
    MPT = auto()
    MPT_TWO = auto()


@dataclasses.dataclass
class Conversation:
    """A template and the dialogue so far.

    `messages` holds `[role, text]` pairs.
    """

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    messages: Sequence[list] = ()
    offset: int = 0  # number of leading messages that are few-shot examples, not dialogue
    sep_style: SeparatorStyle = SeparatorStyle.ADD_COLON_SINGLE
    sep: str = "\n"
    sep2: str = None  # pyrefly: ignore[bad-assignment]  # None in styles without it, as in upstream
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None

    @property
    def style(self) -> "PromptStyle":
        """The entry of PROMPT_STYLES for `sep_style`; raises ValueError if there is none."""
        if self.sep_style not in PROMPT_STYLES:
            raise ValueError(f"template {self.name!r}: separator style {self.sep_style!r} is not supported.")
        return PROMPT_STYLES[self.sep_style]

    @property
    def system_text(self) -> str:
        """The system message in its template."""
        return self.system_template.format(system_message=self.system_message)

    def get_prompt(self) -> str:
        """Render the dialogue as one string.

        An empty or missing message leaves an open slot: only its role is rendered.
        """
        style = self.style
        prompt = style.prefix(self)
        for index, (role, message) in enumerate(self.messages):
            # Upstream's demos attach (text, image, mode) as a message.
            text = message[0] if isinstance(message, tuple) else message
            if text:
                prompt += style.before(self, index, role) + style.clean(text) + style.after(self, index)
            else:
                prompt += style.open_slot(self, index, role)
        return prompt

    def set_system_message(self, system_message: str) -> None:
        """Replace the system message."""
        self.system_message = system_message

    def append_message(self, role: str, message: str | None) -> None:
        """Append a message; None is a slot for an answer."""
        self.messages = [*self.messages, [role, message]]

    def update_last_message(self, message: str | None) -> None:
        """Replace the last message, usually None."""
        self.messages[-1][1] = message

    def to_gradio_chatbot(self) -> list[list]:
        """Return `[user, assistant]` pairs, None for a missing answer."""
        texts = [message for _, message in self.messages[self.offset :]]
        return [[texts[i], texts[i + 1] if i + 1 < len(texts) else None] for i in range(0, len(texts), 2)]

    def to_openai_api_messages(self) -> list[dict[str, str]]:
        """Return chat-completion messages, the system message first, without an open slot."""
        messages = [{"role": "system", "content": self.system_message}]
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2 == 0 or message is not None:
                messages.append({"role": ("user", "assistant")[index % 2], "content": message})
        return messages

    def copy(self) -> "Conversation":
        """Return a copy with its own list of messages."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict[str, Any]:
        """Return the fields that upstream saves."""
        return {
            "template_name": self.name,
            "system_message": self.system_message,
            "roles": self.roles,
            "messages": self.messages,
            "offset": self.offset,
        }


class PromptStyle(NamedTuple):
    """Text before and after each message.

    A message is rendered as `before + clean(message) + after`, a slot without a message as `open_slot`. The integer
    argument is the index of the message, the string argument its role.
    """

    prefix: Callable[[Conversation], str]
    before: Callable[[Conversation, int, str], str]
    after: Callable[[Conversation, int], str]
    open_slot: Callable[[Conversation, int, str], str]
    replacements: tuple[tuple[str, str], ...] = ()  # (old, new) in the text of a message

    def clean(self, text: str) -> str:
        """Return the text of a message as it is rendered."""
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text


# -- parts of the styles: `c` is the conversation, `index` that of the message -----------------------------------------


def _role(suffix: str = "") -> Callable[[Conversation, int, str], str]:
    return lambda c, index, role: role + suffix


def _sep(c: Conversation, index: int) -> str:
    return c.sep


def _sep_by_turn(c: Conversation, index: int) -> str:
    """Return `sep` after the user's message, `sep2` after the assistant's."""
    return (c.sep, c.sep2)[index % 2]


def _sep_of_last_answer(c: Conversation, index: int) -> str:
    """Return `sep2` after a final answer, `sep` after other messages."""
    return c.sep2 if index == len(c.messages) - 1 and c.messages[index][0] == c.roles[1] else c.sep


def _system(c: Conversation) -> str:
    return c.system_text


def _system_sep(c: Conversation) -> str:
    return c.system_text + c.sep


def _optional_system(suffix: str = "") -> Callable[[Conversation], str]:
    return lambda c: c.system_text and c.system_text + c.sep + suffix


def _round(c: Conversation, index: int, role: str) -> str:
    """Start each question with the number of its round (ChatGLM2: from 1)."""
    number = index // 2 + (c.name == "chatglm2")
    return ("" if index % 2 else f"[Round {number}]{c.sep}") + f"{role}："


S = SeparatorStyle
# Columns: prefix, before, after, open_slot.
PROMPT_STYLES: dict[SeparatorStyle, PromptStyle] = {
    S.ADD_COLON_SINGLE: PromptStyle(_system_sep, _role(": "), _sep, _role(":")),
    S.ADD_COLON_TWO: PromptStyle(_system_sep, _role(": "), _sep_by_turn, _role(":")),
    S.ADD_COLON_SPACE_SINGLE: PromptStyle(_system_sep, _role(": "), _sep, _role(": ")),
    S.NO_COLON_SINGLE: PromptStyle(_system, _role(), _sep, _role()),
    S.NO_COLON_TWO: PromptStyle(_system, _role(), _sep_by_turn, _role()),
    S.ADD_NEW_LINE_SINGLE: PromptStyle(_optional_system(), _role("\n"), _sep, _role("\n")),
    S.LLAMA2: PromptStyle(
        lambda c: c.system_text if c.system_message else "[INST] ",
        lambda c, index, role: c.roles[index % 2] + " " if index else "",
        lambda c, index: _sep_by_turn(c, index) if index else " ",
        lambda c, index, role: c.roles[index % 2],
    ),
    S.CHATGLM: PromptStyle(_optional_system(), _round, _sep, _round),
    S.CHATML: PromptStyle(_optional_system("\n"), _role("\n"), lambda c, index: c.sep + "\n", _role("\n")),
    S.CHATINTERN: PromptStyle(_system, _role(":"), lambda c, index: _sep_by_turn(c, index) + "\n", _role(":")),
    S.DOLLY: PromptStyle(
        _system, _role(":\n"), lambda c, index: _sep_by_turn(c, index) + "\n\n" * (index % 2), _role(":\n")
    ),
    S.RWKV: PromptStyle(
        _system,
        _role(": "),
        lambda c, index: "\n\n",
        _role(":"),
        replacements=(("\r\n", "\n"), ("\n\n", "\n")),
    ),
    S.PHOENIX: PromptStyle(_system, _role(": <s>"), lambda c, index: "</s>", _role(": <s>")),
    S.ROBIN: PromptStyle(_system_sep, _role(":\n"), _sep, _role(":\n")),
    S.FALCON_CHAT: PromptStyle(lambda c: _system_sep(c) if c.system_message else "", _role(": "), _sep, _role(":")),
    S.CHATGLM3: PromptStyle(
        lambda c: c.system_text if c.system_message else "", _role("\n "), lambda c, index: "", _role()
    ),
    S.INTERNVL_ZH: PromptStyle(
        lambda c: c.system_message + c.sep2, _role(": "), lambda c, index: _sep_by_turn(c, index + 1), _role(":")
    ),
    S.MPT: PromptStyle(_system_sep, _role(), _sep, _role()),
    S.MPT_TWO: PromptStyle(_system_sep, _role(), _sep_of_last_answer, _role()),
}

conv_templates: dict[str, Conversation] = {}


def register_conv_template(template: Conversation, override: bool = False) -> None:
    """Register a template under its name."""
    assert override or template.name not in conv_templates, f"{template.name} has been registered"
    conv_templates[template.name] = template


def get_conv_template(name: str) -> Conversation:
    """Return a copy of a template; raises KeyError with the supported names."""
    if name not in conv_templates:
        supported = ", ".join(conv_templates)
        raise KeyError(f"conversation template {name!r} is not supported: expected one of {supported}")
    return conv_templates[name].copy()


_ASSISTANT = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_WANXIANG = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
_GPT_OSS = """You are InternVL, a large language model trained by Shanghai AI Laboratory.
Knowledge cutoff: 2024-06
Current date: 2025-08-06

Reasoning: low

# Valid channels: final. Channel must be included for every message."""
_CHATML = {
    "system_template": "<|im_start|>system\n{system_message}",
    "roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "sep_style": S.MPT,
}

for _template in (
    Conversation("internvl_zh", "", "", ("<human>", "<bot>"), sep_style=S.INTERNVL_ZH, sep="</s>", sep2=" "),
    Conversation("Hermes-2", **_CHATML, system_message=_ASSISTANT, sep="<|im_end|>", stop_str="<|endoftext|>"),
    Conversation("internlm2-chat", **_CHATML, system_message=_ASSISTANT, sep="<|im_end|>"),
    Conversation(
        "phi3-chat",
        system_template="<|system|>\n{system_message}",
        system_message=_ASSISTANT,
        roles=("<|user|>\n", "<|assistant|>\n"),
        sep_style=S.MPT,
        sep="<|end|>",
    ),
    Conversation("internvl2_5", **_CHATML, system_message=_WANXIANG, sep="<|im_end|>\n"),
    Conversation(
        "internvl3_5_gpt_oss",
        system_template="<|start|>system<|message|>{system_message}",
        system_message=_GPT_OSS,
        roles=("<|start|>user<|message|>", "<|start|>assistant"),  # the model itself names the channel of its answer
        sep_style=S.MPT_TWO,
        sep="<|end|>",
        sep2="<|return|>",
    ),
):
    register_conv_template(_template)
