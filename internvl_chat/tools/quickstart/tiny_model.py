"""The quickstart's base before training: a complete InternVL checkpoint with random weights and its own tokenizer.

Second stage of shell/quickstart.sh, after digits.py. One patch of the encoder covers one pixel of an 8 x 8 scan:
64 patches, 16 image tokens to a tile. Tiles are half as wide as those of the published models, which saves a third of
the time.
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
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

TEMPLATE = "internvl2_5"
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", END_OF_TURN, *SPECIAL_TOKENS)
VOCABULARY = 512

# Scale of everything that is added up in the encoder's residual stream; the norms make it invisible at the start. A
# patch has 2,352 inputs that rise and fall together, so that one step of Adam moves its embedding by 2,352 learning
# rates: little beside 30, havoc beside 1.
STREAM = 30.0
VISION = {
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
    "initializer_factor": STREAM,  # the layer scale
}
LANGUAGE = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


def texts(annotation: Path) -> list[str]:
    """All turns of a JSONL file of conversations."""
    records = map(json.loads, annotation.read_text().splitlines())
    return [turn["value"] for record in records for turn in record["conversations"]]


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `corpus` and the template's system message: every string has an encoding and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
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


def build(tokenizer: PreTrainedTokenizerFast) -> InternVLChatModel:
    llm = {
        **LANGUAGE,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = InternVLChatConfig(VISION, llm, template=TEMPLATE, force_image_size=VISION["image_size"], ps_version="v2")
    model = InternVLChatModel(config)
    for parameter in model.vision_model.embeddings.parameters():
        parameter.data *= STREAM
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("annotation", type=Path, help="JSONL file whose words the tokenizer learns")
    parser.add_argument("output", type=Path, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(texts(args.annotation))
    model = build(tokenizer)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
