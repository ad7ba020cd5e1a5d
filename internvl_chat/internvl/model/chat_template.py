"""The Jinja chat template of a tokenizer or processor.

It renders messages as `InternVLChatModel.chat` renders a question and its history. `Conversation.get_prompt` defines
the text; here its parts are written into a Jinja template, which transformers and inference engines apply.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import Template

from transformers import PreTrainedTokenizerBase

from internvl.conversation import Conversation
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.chat import IMAGE_PLACEHOLDER, build_conversation
from internvl.model.internvl_chat.generation import add_end_ids
from internvl.model.tokenizers.pipeline import CONFIG_FILE, TOKENIZER_FILE
from internvl.model.tokenizers.v4_compat import add_v4_config_fields, convert_merges_to_v4

VIDEO_PLACEHOLDER = "<video>"
# `$name` stands for an expression of Jinja, in which `index` is the index of a message (the system message has none)
# and `text` its text. vLLM and SGLang pass images as parts if they find a loop over `message['content']`.
JINJA_TEMPLATE = Template("""\
{%- set num_system = 1 if messages and messages[0]['role'] == 'system' else 0 %}
{{- $opening }}
{%- if not num_system %}{{- $default_prefix }}{% endif %}
{%- for message in messages %}
{%- set index = loop.index0 - num_system %}
{%- set role = message['role'] %}
{%- set is_last = loop.last and not add_generation_prompt %}
{%- set parts = namespace(all='', typed='', num_images=0) %}
{%- if message['content'] is string %}
{%- set parts.all = message['content'].replace($placeholder, $image) if role == 'user' else message['content'] %}
{%- elif message['content'] %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}
{%- set parts.all = parts.all ~ part['text'] %}
{%- set parts.typed = parts.typed ~ part['text'] %}
{%- elif part['type'] in ['image', 'image_url'] %}
{%- set parts.all = parts.all ~ $image ~ '\\n' %}
{%- set parts.num_images = parts.num_images + 1 %}
{%- elif part['type'] == 'video' %}
{%- set parts.all = parts.all ~ $video ~ '\\n' %}
{%- else %}
{{- raise_exception('a part of type ' ~ part['type'] ~ ' is not supported: expected text, image or video') }}
{%- endif %}
{%- endfor %}
{%- set num_typed = parts.typed.count($placeholder) %}
{%- if num_typed and num_typed < parts.num_images %}
{{- raise_exception(parts.num_images ~ ' images, but ' ~ num_typed ~ ' ' ~ $placeholder ~ ' in the text') }}
{%- elif num_typed and parts.num_images %}
{%- set parts.all = parts.typed.replace($placeholder, $image, parts.num_images) %}
{%- endif %}
{%- endif %}
{%- set text = parts.all %}
{%- if role == 'system' and loop.first %}{{- $prefix }}
{%- elif role == 'user' %}{{- $user if text else $empty_user }}
{%- elif role == 'assistant' %}{{- $assistant if text else $empty_assistant }}
{%- else %}
{{- raise_exception('message ' ~ loop.index ~ ' is from ' ~ role ~ ': expected user or assistant, or system first') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{%- set index = messages | length - num_system %}
{{- $empty_assistant }}
{%- endif %}""")

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # occurs in no template
LATE_INDEX = 2 * 9876  # of a question in a round whose number is in no other text


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    config: InternVLChatConfig,
    image: str = IMAGE_PLACEHOLDER,
    chat_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Give a tokenizer the chat template of a chat model.

    Args:
        config: its `template` and `system_message` count.
        image: the text that stands for an image. The default is that of `chat` and of engines for InternVLChatModel.
        chat_tokenizer: the tokenizer of the chat model, if it is another one.
    """
    template = build_conversation(config)
    opening = _find_opening(tokenizer, chat_tokenizer or tokenizer, template)
    tokenizer.chat_template = build_jinja_chat_template(template, image, opening)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, config: InternVLChatConfig, folder: str | Path) -> None:
    """Save the tokenizer of a chat model, with its template, for transformers 4 and 5.

    Version 4.37 reads the template from tokenizer_config.json, newer ones from chat_template.jinja. The ids that end an
    answer are added to the folder's generation_config.json: save the model first.
    """
    set_chat_template(tokenizer, config)
    tokenizer.save_pretrained(folder)
    add_v4_config_fields(tokenizer, Path(folder) / CONFIG_FILE, chat_template=tokenizer.chat_template)
    convert_merges_to_v4(Path(folder) / TOKENIZER_FILE)
    add_end_ids(folder, tokenizer, config)


def build_jinja_chat_template(template: Conversation, image: str = IMAGE_PLACEHOLDER, opening: str = "") -> str:
    """Build the Jinja chat template of a conversation template.

    Args:
        image: the text that stands for an image.
        opening: the text before the prompt.
    """
    expressions = {
        "opening": _quote(opening),
        "default_prefix": _quote(template.style.prefix(template)),
        "prefix": _express_prefix(template),
        "placeholder": _quote(IMAGE_PLACEHOLDER),
        "image": _quote(image),
        "video": _quote(VIDEO_PLACEHOLDER),
    }
    for name, role in zip(("user", "assistant"), template.roles, strict=True):
        expressions[name] = _express_message(template, role)
        expressions[f"empty_{name}"] = _express_by_index(
            lambda index, r=role: template.style.open_slot(template, index, r)
        )
    return JINJA_TEMPLATE.substitute(expressions)


def _find_opening(
    tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase, template: Conversation
) -> str:
    """Find the text that stands for the tokens that `chat`'s tokenizer puts before a prompt.

    `apply_chat_template` lets no tokenizer add them, so that they must be in the template. A sentencepiece tokenizer
    puts a space before a text, but not after the beginning-of-text token.
    """
    dialogue = template.copy()
    dialogue.append_message(template.roles[0], "?")
    prompt, bos = dialogue.get_prompt(), tokenizer.bos_token or ""
    expected = chat_tokenizer(prompt).input_ids
    openings = ("", bos, bos + " ")
    return next((o for o in openings if tokenizer(o + prompt, add_special_tokens=False).input_ids == expected), "")


def _express_prefix(template: Conversation) -> str:
    """Write the system message in its template as an expression of `text`."""
    prefix, empty_prefix = (template.style.prefix(replace(template, system_message=message)) for message in (MARK, ""))
    pieces = prefix.split(MARK)
    expression = " ~ text ~ ".join(map(_quote, pieces))
    return expression if empty_prefix == "".join(pieces) else f"{expression} if text else {_quote(empty_prefix)}"


def _express_message(template: Conversation, role: str) -> str:
    """Write a message in its template as an expression of `text`, `index` and `is_last`."""
    style = template.style

    def after(index: int, num_following: int) -> str:
        dialogue = template.copy()
        dialogue.messages = [[role, "?"]] * (index + 1 + num_following)
        return style.after(dialogue, index)

    before = _express_by_index(lambda index: style.before(template, index, role))
    middle, last = (_express_by_index(lambda index, n=n: after(index, n)) for n in (1, 0))
    text = "text" + "".join(f".replace({_quote(old)}, {_quote(new)})" for old, new in style.replacements)
    return f"{before} ~ {text} ~ {middle if middle == last else f'({last} if is_last else {middle})'}"


def _express_by_index(text_at: Callable[[int], str]) -> str:
    """Write a text that depends on the index of a message as an expression of `index`.

    Styles distinguish the first message, and questions from answers; ChatGLM's numbers its rounds.
    """
    first, odd, even, late = (_quote(text_at(index)) for index in (0, 1, 2, LATE_INDEX))
    if even != late:
        offset = int(str(LATE_INDEX // 2) not in late)
        even = late.replace(str(LATE_INDEX // 2 + offset), f'" ~ (index // 2 + {offset}) ~ "')
        return f"({even} if index % 2 == 0 else {odd})"
    return first if first == odd == even else f"[{first}, {odd}, {even}][index and 2 - index % 2]"


def _quote(text: str) -> str:
    """Format a text as a string literal of Jinja (JSON's escapes)."""
    return json.dumps(text, ensure_ascii=False)
