"""Build a tiny InternVL checkpoint with random weights and its own tokenizer.

The base model of the quickstart before training. A patch of the vision encoder covers one pixel of an 8 x 8 scan: 64
patches and 16 image tokens per tile. Tiles have half the width of those of the published models, which saves a third of
the training time.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from internvl.constants import SPECIAL_TOKENS
from internvl.conversation import get_conv_template
from internvl.model.chat_template import save_tokenizer
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

TEMPLATE = "internvl2_5"
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, *SPECIAL_TOKENS)
VOCAB_SIZE = 512

# Scale of the vision encoder's residual stream: of patch and position embeddings, and of the layer scale. Layer norms
# cancel it at the start. A patch has 2352 inputs (28 x 28 x 3) that are almost equal, so one Adam step moves its
# embedding by 2352 learning rates. That is small compared with 30, and would destroy embeddings of scale 1.
RESIDUAL_SCALE = 30.0
VISION_CONFIG = {
    "architectures": ["InternVisionModel"],
    "image_size": 224,
    "patch_size": 28,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
    "initializer_factor": RESIDUAL_SCALE,  # initial layer scale
}
LLM_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


def read_texts(annotation: Path) -> list[str]:
    """Read the text of all turns of an annotation file."""
    records = map(json.loads, annotation.read_text().splitlines())
    return [turn["value"] for record in records for turn in record["conversations"]]


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts and the chat template.

    Byte level: every string has an encoding, and decoding restores it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    system = get_conv_template(TEMPLATE).system_message
    tokenizer.train_from_iterator([*corpus, *[f"system\n{system}", "user\n", "assistant\n"] * 100], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[token for token in CONTROL_TOKENS if token not in (END_OF_TURN, END_OF_TEXT)],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> InternVLChatModel:
    """Build the chat model with random weights for a tokenizer."""
    llm_config = {
        **LLM_CONFIG,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = InternVLChatConfig(
        VISION_CONFIG,
        llm_config,
        template=TEMPLATE,
        force_image_size=VISION_CONFIG["image_size"],
        ps_version="v2",
    )
    model = InternVLChatModel(config)
    for parameter in model.vision_model.embeddings.parameters():
        parameter.data *= RESIDUAL_SCALE
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotation", type=Path, help="annotation file (JSONL) that the tokenizer is trained on")
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(read_texts(args.annotation))
    model = build_model(tokenizer)
    model.save_pretrained(args.output)
    save_tokenizer(tokenizer, model.config, args.output)
    print(f"saved {args.output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
