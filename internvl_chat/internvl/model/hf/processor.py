"""Tokenizer, processor and chat template of a converted checkpoint.

A dialogue gets the same template, tiles and end tokens from transformers' InternVL processor as from
`InternVLChatModel.chat`. `hf/weights.py` and `hf/config.py` convert the rest of the checkpoint.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GenerationConfig, InternVLProcessor, InternVLVideoProcessor
from transformers.models.got_ocr2 import GotOcr2ImageProcessor

from internvl.constants import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN
from internvl.model.auxiliary_files import read_normalization
from internvl.model.chat_template import VIDEO_PLACEHOLDER, set_chat_template
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens, get_tile_size
from internvl.model.internvl_chat.generation import GENERATION_CONFIG_FILE, add_end_ids, load_generation_config
from internvl.model.tokenizers.loading import PreTrainedTokenizerFast, load_tokenizer
from internvl.model.tokenizers.v4_compat import update_json

# Attributes that InternVLProcessor reads from its tokenizer.
PROCESSOR_TOKENS = {
    "start_image_token": IMG_START_TOKEN,
    "end_image_token": IMG_END_TOKEN,
    "context_image_token": IMG_CONTEXT_TOKEN,
    "video_token": VIDEO_PLACEHOLDER,
}

# Special tokens that a tokenizer has as attributes.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def save_processor(config: InternVLChatConfig, source: str | Path, output_dir: Path) -> None:
    """Save tokenizer, processor, chat template and generation configuration.

    Args:
        config: configuration of the chat checkpoint `source`, whose tokenizer is converted.
    """
    chat_tokenizer = load_tokenizer(source)
    tokenizer = _convert_to_fast_tokenizer(chat_tokenizer, **PROCESSOR_TOKENS)
    set_chat_template(tokenizer, config, IMG_CONTEXT_TOKEN, chat_tokenizer)
    mean, std = read_normalization(source)
    preprocessing = {
        "size": {"height": get_tile_size(config), "width": get_tile_size(config)},
        "image_mean": mean,
        "image_std": std,
    }
    min_tiles, max_tiles = (config.min_dynamic_patch, config.max_dynamic_patch) if config.dynamic_image_size else (1, 1)
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**preprocessing, crop_to_patches=True, min_patches=min_tiles, max_patches=max_tiles),
        tokenizer,
        InternVLVideoProcessor(**preprocessing),
        image_seq_length=count_image_tokens(config),
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(output_dir)
    # transformers 4 reads a file for each part, and version 4.52 fails if processor_config.json holds them as well.
    processor.image_processor.save_pretrained(output_dir)
    processor.video_processor.save_pretrained(output_dir)
    update_json(output_dir / "processor_config.json", image_processor=None, video_processor=None)
    update_json(
        output_dir / "tokenizer_config.json",
        chat_template=tokenizer.chat_template,
        extra_special_tokens=PROCESSOR_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )
    _save_generation_config(config, tokenizer, source, output_dir)


def _save_generation_config(config: InternVLChatConfig, tokenizer, source: str | Path, output_dir: Path) -> None:
    """Save the settings of the chat checkpoint, with the ids that end an answer of `chat` as well."""
    file = output_dir / GENERATION_CONFIG_FILE
    (load_generation_config(source) or GenerationConfig()).to_json_file(file)
    add_end_ids(output_dir, tokenizer, config)
    # With _from_model_config, transformers 4 replaces the settings by those of the LLM.
    update_json(file, pad_token_id=tokenizer.pad_token_id, _from_model_config=None)


def load_chat_tokenizer(source: str | Path, num_embeddings: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer of an HF checkpoint for a chat model.

    Tokens without an embedding are left out. In most models that is `<video>`, which the processor replaces by image
    tokens.
    """
    return _convert_to_fast_tokenizer(load_tokenizer(source), num_embeddings)


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
