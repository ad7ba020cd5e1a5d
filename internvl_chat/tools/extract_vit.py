"""Takes the vision encoder out of a chat checkpoint: `python tools/extract_vit.py MODEL OUT`.

OUT is a checkpoint of its own in bfloat16, for `InternVisionModel.from_pretrained` and `--vision_path` of the training
entries. Adapters are merged into the weights.
"""

import argparse

import torch

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="folder for the vision encoder")
    args = parser.parse_args(argv)

    source = checkpoint_folder(args.model_path, CHAT)
    with new_folder(args.output_path) as folder:
        model = merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16))
        model.vision_model.save_pretrained(folder)
    print(f"vision encoder: {args.output_path}")


if __name__ == "__main__":
    main()
