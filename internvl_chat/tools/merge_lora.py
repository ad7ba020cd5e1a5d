"""Merges LoRA adapters into the weights: `python tools/merge_lora.py IN OUT` writes a plain checkpoint in bfloat16."""

import argparse

import torch

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.model.checkpoint import merge_adapters
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizer import load_tokenizer


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input_path", help="chat checkpoint with adapters")
    parser.add_argument("output_path", help="folder for the merged checkpoint, tokenizer included")
    args = parser.parse_args(argv)

    source = checkpoint_folder(args.input_path, CHAT)
    tokenizer = load_tokenizer(source)
    model = InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16)
    if not (model.config.use_backbone_lora or model.config.use_llm_lora):
        raise ValueError(f"{source} has no adapters: use_backbone_lora and use_llm_lora are 0 in its config.json")
    with new_folder(args.output_path) as folder:
        merge_adapters(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged checkpoint: {args.output_path}")


if __name__ == "__main__":
    main()
