"""Extract the vision encoder of a chat checkpoint.

    internvl convert extract-vit MODEL OUT

OUT is a checkpoint in bfloat16 for `InternVisionModel.from_pretrained` and `--vision_path` of the training programs.
Adapters are merged first.
"""

import torch

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.model.auxiliary_files import read_auxiliary_files, write_auxiliary_files
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.tool_parser import ToolParser


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="new folder for the vision encoder")
    args = parser.parse_args(argv)

    source = require_checkpoint_dir(args.model_path, CHAT_MODEL_TYPE)
    with create_output_dir(args.output_path) as output_dir:
        model = merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16))
        model.vision_model.save_pretrained(output_dir)
        write_auxiliary_files(read_auxiliary_files(source), output_dir, "extracting the vision encoder")
    print(f"Vision encoder: {args.output_path}")


if __name__ == "__main__":
    main()
