"""Quantize a chat checkpoint to 8 bits with bitsandbytes.

    internvl convert int8 [MODEL [OUT]]

`InternVLChatModel.from_pretrained(OUT)` loads the result. Requires `pip install bitsandbytes`. Runs on the GPU if there
is one.
"""

import torch
from transformers import BitsAndBytesConfig

from internvl.command_line import create_output_dir, exit_on_user_error
from internvl.model.adapter_io import require_no_adapters
from internvl.model.auxiliary_files import read_auxiliary_files, write_auxiliary_files
from internvl.model.chat_template import save_tokenizer
from internvl.model.code_files import add_remote_code_flag
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tool_parser import ToolParser
from internvl.versions import require_package

# Upstream's tool has no arguments, but these two paths.
DEFAULT_MODEL, DEFAULT_OUTPUT = "OpenGVLab/InternVL-Chat-V1-5", "release/InternVL-Chat-V1-5-Int8"


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument(
        "model_path",
        nargs="?",
        default=DEFAULT_MODEL,
        help="chat checkpoint without adapters, a folder or a hub name (default: %(default)s)",
    )
    parser.add_argument(
        "output_path",
        nargs="?",
        default=DEFAULT_OUTPUT,
        help="new folder for the result (default: %(default)s)",
    )
    add_remote_code_flag(parser)
    args = parser.parse_args(argv)
    require_package("bitsandbytes", "quantizing to 8 bits")
    tokenizer = load_tokenizer(args.model_path)
    require_no_adapters(InternVLChatConfig.from_pretrained(args.model_path), args.model_path)
    with create_output_dir(args.output_path) as output_dir:
        model = InternVLChatModel.from_pretrained(
            args.model_path,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            dtype=torch.float16,
            device_map="cuda:0" if torch.cuda.is_available() else "cpu",
        )
        model.save_pretrained(output_dir)
        save_tokenizer(tokenizer, model.config, output_dir)
        files = read_auxiliary_files(args.model_path)
        write_auxiliary_files(files, output_dir, "quantizing to 8 bits", args.with_remote_code)
    print(f"8-bit checkpoint: {output_dir}")


if __name__ == "__main__":
    main()
