"""Turns a checkpoint of transformers' `InternVLForConditionalGeneration` into a chat checkpoint.

    python tools/internvl_hf2custom.py --hf_path HF --save_path CHAT [--custom_path REFERENCE]

The inverse of internvl_custom2hf.py, to the bit. With `--custom_path`, the result takes the template, tiling and
tokenizer of that chat checkpoint, is an InternLM2 again if that is one, and its distance from it is printed.
"""

import argparse

import torch
from transformers import GenerationConfig, InternVLConfig

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.model.hf.config import to_chat_config
from internvl.model.hf.processor import save_chat_tokenizer
from internvl.model.hf.weights import to_custom
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.safetensors_io import Checkpoint, Tensors, compute_l2_distance, save_tensors
from internvl.model.tokenizers.loading import load_tokenizer


def convert_keys_back(hf_state_dict: Tensors, llm_config=None) -> dict[str, torch.Tensor]:
    """A state dict of transformers' class under the chat model's names, for the language model of `llm_config`."""
    return dict(to_custom(hf_state_dict, llm_config, tied="lm_head.weight" not in hf_state_dict))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--custom_path",
        help="chat checkpoint like the wanted one, to take what the other format lacks and to compare with",
    )
    parser.add_argument("--hf_path", required=True, help="checkpoint of transformers' class to convert")
    parser.add_argument("--save_path", required=True, help="folder for the chat checkpoint")
    args = parser.parse_args(argv)

    hf_config = InternVLConfig.from_pretrained(checkpoint_folder(args.hf_path, InternVLConfig.model_type))
    hf, tied = Checkpoint(args.hf_path), hf_config.tie_word_embeddings
    reference = (
        InternVLChatConfig.from_pretrained(checkpoint_folder(args.custom_path, CHAT)) if args.custom_path else None
    )
    config = to_chat_config(hf_config, reference)
    if reference is None and not hasattr(hf_config, "internvl_chat"):
        print(f"note: {args.hf_path} tells no conversation template and no tiling; taking {config.template} and 1-12")

    with new_folder(args.save_path) as folder:
        save_tensors(to_custom(hf, config.llm_config, tied), folder)
        config.save_pretrained(folder)
        GenerationConfig.from_pretrained(args.hf_path).save_pretrained(folder)
        if args.custom_path:
            load_tokenizer(args.custom_path).save_pretrained(folder)
        else:
            save_chat_tokenizer(args.hf_path, config.llm_config.vocab_size, folder)
        InternVLChatModel.from_pretrained(folder, device_map="meta")  # refuses tensors too many, too few, misshapen
    print(f"chat checkpoint: {folder}")
    if args.custom_path:
        compute_l2_distance(Checkpoint(folder), Checkpoint(args.custom_path))


if __name__ == "__main__":
    main()
