"""Convert a chat checkpoint to another tile size.

    python tools/resize_pos_embed.py MODEL OUT 448

Position embeddings are interpolated (bicubic) and the configuration is updated. Adapters are merged first. The result
is saved in bfloat16.
"""

import argparse

import torch

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.internvl_chat.resize import set_image_size
from internvl.model.tokenizers.loading import load_tokenizer


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="new folder for the resized checkpoint and its tokenizer")
    parser.add_argument("force_image_size", type=int, help="tile size in pixels")
    args = parser.parse_args(argv)

    source = require_checkpoint_dir(args.model_path, CHAT_MODEL_TYPE)
    tokenizer = load_tokenizer(source)
    with create_output_dir(args.output_path) as output_dir:
        model = merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16))
        set_image_size(model, args.force_image_size)
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
    print(f"Resized checkpoint: {output_dir} ({model.num_image_token} image tokens per tile)")


if __name__ == "__main__":
    main()
