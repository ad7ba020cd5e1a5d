"""Convert a chat checkpoint to another tile size.

    internvl convert resize MODEL OUT 448

Position embeddings are interpolated (bicubic) and the configuration is updated. Adapters are merged first. The result
is saved in bfloat16.
"""

import torch

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.model.auxiliary_files import (
    describe_ignored_by_engines,
    read_auxiliary_files,
    set_tile_size,
    write_auxiliary_files,
)
from internvl.model.chat_template import save_tokenizer
from internvl.model.code_files import add_remote_code_flag
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.internvl_chat.resize import set_image_size
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tool_parser import ToolParser


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="new folder for the resized checkpoint and its tokenizer")
    parser.add_argument("force_image_size", type=int, help="tile size in pixels")
    add_remote_code_flag(parser)
    args = parser.parse_args(argv)

    source = require_checkpoint_dir(args.model_path, CHAT_MODEL_TYPE)
    tokenizer, files = load_tokenizer(source), read_auxiliary_files(source)
    set_tile_size(files, args.force_image_size)
    ignored_note = describe_ignored_by_engines(InternVLChatConfig.from_pretrained(source), source)
    with create_output_dir(args.output_path) as output_dir:
        model = merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16))
        set_image_size(model, args.force_image_size)
        model.save_pretrained(output_dir)
        save_tokenizer(tokenizer, model.config, output_dir)
        made_by = f"resizing tiles to {args.force_image_size} pixels"
        write_auxiliary_files(files, output_dir, made_by, args.with_remote_code)
    print(f"Resized checkpoint: {output_dir} ({model.num_image_token} image tokens per tile)")
    if ignored_note:
        print(f"Note: {ignored_note}")


if __name__ == "__main__":
    main()
