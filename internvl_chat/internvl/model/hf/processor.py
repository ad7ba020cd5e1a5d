"""Tokenizer, processor and chat template of a converted checkpoint.

A dialogue gets the same template, tiles and end tokens from transformers' InternVL processor as from
`InternVLChatModel.chat`. `hf/weights.py` and `hf/config.py` convert the rest of the checkpoint.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig, InternVLProcessor, InternVLVideoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2 import GotOcr2ImageProcessor

from internvl.constants import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN
from internvl.conversation import Conversation
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.chat import build_conversation, get_end_marker
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens, get_tile_size
from internvl.model.tokenizers.loading import PreTrainedTokenizerFast, load_tokenizer

# Attributes that InternVLProcessor reads from its tokenizer.
PROCESSOR_TOKENS = {
    "start_image_token": IMG_START_TOKEN,
    "end_image_token": IMG_END_TOKEN,
    "context_image_token": IMG_CONTEXT_TOKEN,
    "video_token": "<video>",
}

# Special tokens that a tokenizer has as attributes.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# Jinja in a `str.format` string: doubled braces are Jinja's.
CHAT_TEMPLATE = """\
{{%- set head = {{'system': {system[0]}, 'user': {user[0]}, 'assistant': {assistant[0]}}} %}}
{{%- set tail = {{'system': {system[1]}, 'user': {user[1]}, 'assistant': {assistant[1]}}} %}}
{{%- if messages[0]['role'] != 'system' %}}{{{{ head['system'] + {system_message} + tail['system'] }}}}{{% endif %}}
{{%- for message in messages %}}
{{{{- head[message['role']] }}}}
{{%- if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}
{{%- for part in message['content'] %}}
{{%- if part['type'] == 'text' %}}{{{{ part['text'] }}}}
{{%- elif part['type'] == 'image' %}}{{{{ '{image}\\n' }}}}
{{%- elif part['type'] == 'video' %}}{{{{ '{video}\\n' }}}}{{% endif %}}
{{%- endfor %}}{{% endif %}}
{{{{- tail[message['role']] }}}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"""


def build_jinja_chat_template(template: Conversation) -> str:
    """Build the Jinja chat template of a conversation template.

    Images and videos become the placeholders that transformers' processor replaces.
    """
    user, assistant = template.roles
    dialogue = template.copy()
    dialogue.messages = [[user, "?"], [assistant, "!"], [user, "?"], [assistant, None]]
    style = template.style
    placeholder = "\N{OBJECT REPLACEMENT CHARACTER}"  # occurs in no template
    dialogue.system_message = placeholder
    system_text = style.prefix(dialogue)
    # Role -> the text before and after its message.
    surroundings = {
        "system": system_text.split(placeholder) if placeholder in system_text else ("", ""),
        "user": (style.before(dialogue, 0, user), style.after(dialogue, 0)),
        "assistant": (style.before(dialogue, 1, assistant), style.after(dialogue, 1)),
    }
    return CHAT_TEMPLATE.format(
        **{role: [_quote(text) for text in texts] for role, texts in surroundings.items()},
        system_message=_quote(template.system_message),
        answer=_quote(style.open_slot(dialogue, 3, assistant)),
        image=IMG_CONTEXT_TOKEN,
        video=PROCESSOR_TOKENS["video_token"],
    )


def _quote(text: str) -> str:
    """Format a text as a string literal of Jinja (JSON's escapes)."""
    return json.dumps(text, ensure_ascii=False)


def save_processor(config: InternVLChatConfig, source: str | Path, output_dir: str | Path) -> None:
    """Save tokenizer, processor, chat template and generation configuration.

    Args:
        config: configuration of the chat checkpoint `source`, whose tokenizer is converted.
    """
    template = build_conversation(config)
    tokenizer = _convert_to_fast_tokenizer(load_tokenizer(source), **PROCESSOR_TOKENS)
    preprocessing = {
        "size": {"height": get_tile_size(config), "width": get_tile_size(config)},
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    min_tiles, max_tiles = (config.min_dynamic_patch, config.max_dynamic_patch) if config.dynamic_image_size else (1, 1)
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**preprocessing, crop_to_patches=True, min_patches=min_tiles, max_patches=max_tiles),
        tokenizer,
        InternVLVideoProcessor(**preprocessing),
        image_seq_length=count_image_tokens(config),
        chat_template=build_jinja_chat_template(template),
    )
    processor.save_pretrained(output_dir)
    end_token_id = tokenizer.convert_tokens_to_ids(get_end_marker(template))
    eos_token_ids = sorted({end_token_id, tokenizer.eos_token_id} - {None, tokenizer.unk_token_id})
    GenerationConfig(eos_token_id=eos_token_ids, pad_token_id=tokenizer.pad_token_id).save_pretrained(output_dir)


def save_chat_tokenizer(source: str | Path, num_embeddings: int, output_dir: Path) -> None:
    """Save the tokenizer of an HF checkpoint for a chat model.

    Tokens without an embedding are left out. In most models that is `<video>`, which the processor replaces by image
    tokens.
    """
    _convert_to_fast_tokenizer(load_tokenizer(source), num_embeddings).save_pretrained(output_dir)


def _convert_to_fast_tokenizer(
    tokenizer, max_tokens: int | None = None, **extra_tokens: str
) -> PreTrainedTokenizerFast:
    """Return an equal tokenizer that loads without this package.

    Args:
        max_tokens: leave out added tokens from this id on.
        extra_tokens: attributes that InternVLProcessor reads, such as `video_token`.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline["added_tokens"] = [t for t in pipeline["added_tokens"] if max_tokens is None or t["id"] < max_tokens]
    kept_tokens = {token["content"] for token in pipeline["added_tokens"]}
    named_tokens = {name: token for name in NAMED_TOKENS if (token := getattr(tokenizer, name))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(pipeline)),
        extra_special_tokens=[token for token in map(str, tokenizer.extra_special_tokens) if token in kept_tokens],
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **named_tokens,
        **extra_tokens,
    )
