"""Fits a chat checkpoint to tiles of another size: `python tools/resize_pos_embed.py MODEL OUT 448`.

Position embeddings are resized (bicubic) and the configuration says so. Adapters are merged into the weights, which are
saved in bfloat16.
"""

import argparse

import torch

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.model.compose import resize_image
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.tokenizers.loading import load_tokenizer


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="folder for the resized checkpoint, tokenizer included")
    parser.add_argument("force_image_size", type=int, help="side of a tile in pixels")
    args = parser.parse_args(argv)

    source = checkpoint_folder(args.model_path, CHAT)
    tokenizer = load_tokenizer(source)
    with new_folder(args.output_path) as folder:
        model = merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16))
        resize_image(model, args.force_image_size)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{model.num_image_token} image tokens to a tile of {args.force_image_size} pixels: {folder}")


if __name__ == "__main__":
    main()
