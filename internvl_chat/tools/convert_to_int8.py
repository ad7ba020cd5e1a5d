"""Quantizes a chat checkpoint to 8 bits with bitsandbytes: `python tools/convert_to_int8.py [MODEL [OUT]]`.

The result loads with `InternVLChatModel.from_pretrained(OUT)`. Needs `pip install bitsandbytes`; works on the GPU where
there is one.
"""

import argparse
import importlib.util

import torch
from transformers import BitsAndBytesConfig

from internvl.command_line import command, new_folder
from internvl.model.adapter_io import refuse_adapters
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

MODEL, OUT = "OpenGVLab/InternVL-Chat-V1-5", "release/InternVL-Chat-V1-5-Int8"


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_path", nargs="?", default=MODEL, help=f"chat checkpoint or its hub name ({MODEL})")
    parser.add_argument("output_path", nargs="?", default=OUT, help=f"folder for the 8-bit checkpoint ({OUT})")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantizing to 8 bits needs bitsandbytes: pip install bitsandbytes")
    tokenizer = load_tokenizer(args.model_path)
    refuse_adapters(InternVLChatConfig.from_pretrained(args.model_path), args.model_path)
    with new_folder(args.output_path) as folder:
        model = InternVLChatModel.from_pretrained(
            args.model_path,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            dtype=torch.float16,
            device_map="cuda:0" if torch.cuda.is_available() else "cpu",
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"8-bit checkpoint: {folder}")


if __name__ == "__main__":
    main()
