"""The files beside a converted model from which transformers' InternVL processor reads text, pictures and films.

What it makes of a dialogue is what `InternVLChatModel.chat` makes of it: the same template, tiles and end tokens. The
companion of `hf_config` and `hf_format`.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig, InternVLProcessor, InternVLVideoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2 import GotOcr2ImageProcessor

from internvl.conversation import Conversation
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.chat import build_conversation, end_marker
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens, tile_size
from internvl.model.tokenizers.loading import PreTrainedTokenizerFast, load_tokenizer

IMAGE_TOKEN = "<IMG_CONTEXT>"
# What the processor asks of a tokenizer beyond its vocabulary.
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": "<video>",
}

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

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


def chat_template(template: Conversation) -> str:
    """A conversation template in Jinja, as transformers renders dialogues (with the placeholders of its processor)."""
    user, assistant = template.roles
    dialogue = template.copy()
    dialogue.messages = [[user, "?"], [assistant, "!"], [user, "?"], [assistant, None]]
    style = template.style
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    dialogue.system_message = mark
    around = {
        "system": style.prefix(dialogue).split(mark) if mark in style.prefix(dialogue) else ("", ""),
        "user": (style.before(dialogue, 0, user), style.after(dialogue, 0)),
        "assistant": (style.before(dialogue, 1, assistant), style.after(dialogue, 1)),
    }
    return CHAT_TEMPLATE.format(
        **{role: [_literal(text) for text in texts] for role, texts in around.items()},
        system_message=_literal(template.system_message),
        answer=_literal(style.open(dialogue, 3, assistant)),
        image=IMAGE_TOKEN,
        video=TOKENS["video_token"],
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def save_processor(config: InternVLChatConfig, source: str | Path, folder: str | Path) -> None:
    """Writes tokenizer, processors, chat template and generation settings of the chat checkpoint `source`."""
    template = build_conversation(config)
    tokenizer = _saved_as_json(load_tokenizer(source), **TOKENS)
    pictures = {
        "size": {"height": tile_size(config), "width": tile_size(config)},
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    tiles = (config.min_dynamic_patch, config.max_dynamic_patch) if config.dynamic_image_size else (1, 1)
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**pictures, crop_to_patches=True, min_patches=tiles[0], max_patches=tiles[1]),
        tokenizer,
        InternVLVideoProcessor(**pictures),
        image_seq_length=count_image_tokens(config),
        chat_template=chat_template(template),
    )
    processor.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(end_marker(template))
    ends = sorted({end, tokenizer.eos_token_id} - {None, tokenizer.unk_token_id})
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def save_chat_tokenizer(source: str | Path, rows: int, folder: Path) -> None:
    """Writes the tokenizer of transformers' checkpoint `source` for a chat model whose embeddings have so many rows.

    The processor's `<video>` has no row in most models, as it never reaches one; a chat model's tokenizer does without.
    """
    _saved_as_json(load_tokenizer(source), rows).save_pretrained(folder)


def _saved_as_json(tokenizer, rows: int | None = None, **tokens: str) -> PreTrainedTokenizerFast:
    """The same tokenizer, with only `rows` tokens, as the class that any transformers loads without code of ours."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    pipeline["added_tokens"] = [token for token in pipeline["added_tokens"] if rows is None or token["id"] < rows]
    left = {token["content"] for token in pipeline["added_tokens"]}
    named = {name: token for name in NAMED if (token := getattr(tokenizer, name))}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(pipeline)),
        extra_special_tokens=[token for token in map(str, tokenizer.extra_special_tokens) if token in left],
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **named,
        **tokens,
    )
