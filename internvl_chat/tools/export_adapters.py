"""Export the LoRA adapters of a chat model as one PEFT adapter.

    python tools/export_adapters.py IN OUT [--parts language_model ...] [--base HF]

The adapter is for transformers' own InternVL class and for serving engines. `PeftModel.from_pretrained(hf_model, OUT)`
is the adapted model, where `hf_model` is the base model that tools/internvl_custom2hf.py writes. Engines that support
adapters of the LLM only need `--parts language_model`.
"""

import argparse

from safetensors.torch import save_file

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.model.adapter_io import read_part_adapter, require_finite
from internvl.model.hf.adapter import convert_adapters_to_hf
from internvl.model.hf.config import convert_config_to_hf
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE, TRAINED_TENSORS_FILE
from internvl.model.internvl_chat.merge import remove_adapter_fields
from internvl.model.lora import LORA_RANK_FIELDS


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_path", help="chat checkpoint with adapters")
    parser.add_argument("output_path", help="new folder for the PEFT adapter")
    parser.add_argument(
        "--parts", nargs="+", choices=LORA_RANK_FIELDS, help="parts whose adapters are exported (default: all)"
    )
    parser.add_argument("--base", help="base model to record in adapter_config.json: a folder or a hub name")
    args = parser.parse_args(argv)

    source = require_checkpoint_dir(args.input_path, CHAT_MODEL_TYPE)
    config = InternVLChatConfig.from_pretrained(source)
    available = {part: adapter for part in LORA_RANK_FIELDS if (adapter := read_part_adapter(source, part, config))}
    requested = args.parts or list(available or LORA_RANK_FIELDS)
    if missing := [part for part in requested if part not in available]:
        raise ValueError(f"{source} has no adapters of {', '.join(missing)}")
    llm_config = config.llm_config
    hf_config = convert_config_to_hf(remove_adapter_fields(config), image_token_id=0, is_tied=False)
    # `convert_adapters_to_hf` keeps the scale of the first part. With the LLM first, its adapter stays unchanged.
    adapters = {part: available[part] for part in reversed(LORA_RANK_FIELDS) if part in requested}
    settings, tensors = convert_adapters_to_hf(adapters, llm_config, hf_config)
    settings.base_model_name_or_path = args.base
    require_finite(tensors, source)
    with create_output_dir(args.output_path) as output_dir:
        save_file(tensors, output_dir / ADAPTER_FILE, metadata={"format": "pt"})
        settings.save_pretrained(str(output_dir))
    print(f"PEFT adapter: {output_dir}")
    print(f"LoRA rank: {settings.r}")
    print(f"Parts: {', '.join(adapters)}")
    if skipped := [part for part in available if part not in requested]:
        print(f"Note: adapters not exported: {', '.join(skipped)}")
    if (source / TRAINED_TENSORS_FILE).is_file():
        print(
            f"Note: the run also trained other weights ({TRAINED_TENSORS_FILE}), which no PEFT adapter contains. "
            "Use a base model that has them, or merge everything with tools/merge_lora.py"
        )


if __name__ == "__main__":
    main()
