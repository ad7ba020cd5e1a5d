"""Merges LoRA adapters into the weights: `python tools/merge_lora.py IN OUT` writes a plain checkpoint."""

import argparse

import torch

from internvl.model.checkpoint import merge_adapters
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizer import load_tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input_path", help="chat checkpoint with adapters")
    parser.add_argument("output_path", help="folder for the merged checkpoint, tokenizer included")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.input_path)
    model = InternVLChatModel.from_pretrained(args.input_path, torch_dtype=torch.bfloat16)
    if not (model.config.use_backbone_lora or model.config.use_llm_lora):
        parser.error(f"{args.input_path} has no adapters: use_backbone_lora and use_llm_lora are 0 in its config.json")
    merge_adapters(model).save_pretrained(args.output_path)
    tokenizer.save_pretrained(args.output_path)
    print(f"merged checkpoint: {args.output_path}")


if __name__ == "__main__":
    main()
