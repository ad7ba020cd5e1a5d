"""Writes a chat model's LoRA adapters as one PEFT folder for transformers' own class: for serving engines and PEFT.

    python tools/export_adapters.py IN OUT [--parts language_model ...] [--base NATIVE]

`PeftModel.from_pretrained(native, OUT)` is then the adapted model, where `native` is the base as
tools/internvl_custom2hf.py writes it. Engines that adapt the language model alone take `--parts language_model`.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.model.adapter_io import read_adapters, refuse_not_finite
from internvl.model.hf.adapter import to_hf_adapter
from internvl.model.hf.config import to_hf_config
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.merge import without_adapters
from internvl.model.lora import LORA_RANK_FIELDS


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_path", help="chat checkpoint with adapters")
    parser.add_argument("output_path", help="folder for the adapter")
    parser.add_argument(
        "--parts", nargs="+", choices=LORA_RANK_FIELDS, help="whose adapters (default: all that there are)"
    )
    parser.add_argument("--base", help="written into the adapter as the model it stands on: a folder or a hub's id")
    args = parser.parse_args(argv)

    source = checkpoint_folder(args.input_path, CHAT)
    config = InternVLChatConfig.from_pretrained(source)
    found = {part: adapter for part in LORA_RANK_FIELDS if (adapter := read_adapters(source, part, config))}
    wanted = args.parts or list(found)
    if lacking := [part for part in wanted if part not in found] or ([] if found else list(LORA_RANK_FIELDS)):
        raise ValueError(f"{source} has no adapters of {', '.join(lacking)}")
    llm_config = config.llm_config
    native = to_hf_config(without_adapters(config), image_token_id=0, tied=False)
    # Its own scale for the language model, if that is among them: `to_hf_adapter` keeps the first one's.
    adapters = {part: found[part] for part in sorted(wanted, key=list(LORA_RANK_FIELDS).index, reverse=True)}
    settings, tensors = to_hf_adapter(adapters, llm_config, native)
    settings.base_model_name_or_path = args.base
    refuse_not_finite(tensors, source)
    with new_folder(args.output_path) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings.save_pretrained(folder)
    print(f"adapter of rank {settings.r} for {', '.join(adapters)}: {folder}")
    if left := [part for part in found if part not in wanted]:
        print(f"note: the adapters of {', '.join(left)} are left out")
    if (Path(source) / "trained.safetensors").is_file():
        print(
            "note: the run trained other weights, too (trained.safetensors), which no adapter folder can hold: the base"
        )
        print("      must have them, or the whole be merged with tools/merge_lora.py")


if __name__ == "__main__":
    main()
