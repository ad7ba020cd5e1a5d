"""Convert a checkpoint of `InternVLForConditionalGeneration` to a chat checkpoint.

    internvl convert from-hf --hf_path HF --save_path CHAT [--custom_path REFERENCE]

The exact inverse of internvl_custom2hf.py. With --custom_path, the result has the template, tiling and tokenizer of
that chat checkpoint, becomes an InternLM2 again if that is one, and its L2 distance from it is printed.
"""

import torch
from transformers import InternVLConfig

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.model.auxiliary_files import (
    AuxiliaryFiles,
    build_preprocessor_config,
    describe_ignored_by_engines,
    read_auxiliary_files,
    read_normalization,
    update_preprocessor_config,
    write_auxiliary_files,
)
from internvl.model.chat_template import save_tokenizer
from internvl.model.code_files import add_remote_code_flag
from internvl.model.hf.config import convert_config_to_custom, load_hf_config
from internvl.model.hf.processor import load_chat_tokenizer
from internvl.model.hf.weights import HF_HEAD, convert_weights_to_custom
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import get_tile_size
from internvl.model.internvl_chat.generation import GENERATION_CONFIG_FILE, load_generation_config
from internvl.model.safetensors_io import CheckpointTensors, StateDict, compute_l2_distance, save_tensors
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tool_parser import ToolParser


def convert_keys_back(hf_state_dict: StateDict, llm_config=None) -> dict[str, torch.Tensor]:
    """Convert a state dict of transformers' class to the custom format.

    Args:
        llm_config: the chat model's; required for InternLM2.
    """
    return dict(convert_weights_to_custom(hf_state_dict, llm_config, is_tied=HF_HEAD not in hf_state_dict))


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--custom_path", help="similar chat checkpoint: source of what the HF format lacks, compared with the result"
    )
    parser.add_argument("--hf_path", required=True, help="HF checkpoint")
    parser.add_argument("--save_path", required=True, help="new folder for the chat checkpoint")
    add_remote_code_flag(parser)
    args = parser.parse_args(argv)

    hf_config = load_hf_config(require_checkpoint_dir(args.hf_path, InternVLConfig.model_type))
    hf, is_tied = CheckpointTensors(args.hf_path), hf_config.tie_word_embeddings
    reference = None
    if args.custom_path:
        reference = InternVLChatConfig.from_pretrained(require_checkpoint_dir(args.custom_path, CHAT_MODEL_TYPE))
    config = convert_config_to_custom(hf_config, reference)
    config.auto_map = getattr(reference, "auto_map", {})
    if reference is None and not hasattr(hf_config, "internvl_chat"):
        print(
            f"Note: {args.hf_path} records no template and no tiling; using {config.template} and "
            f"{config.min_dynamic_patch} to {config.max_dynamic_patch} tiles"
        )

    files = collect_files(args.hf_path, args.custom_path, config)
    with create_output_dir(args.save_path) as output_dir:
        save_tensors(convert_weights_to_custom(hf, config.llm_config, is_tied), output_dir)
        config.save_pretrained(output_dir)
        if generation_config := load_generation_config(args.hf_path):
            generation_config.to_json_file(output_dir / GENERATION_CONFIG_FILE)
        if args.custom_path:
            save_tokenizer(load_tokenizer(args.custom_path), config, output_dir)
        else:
            save_tokenizer(load_chat_tokenizer(args.hf_path, config.llm_config.vocab_size), config, output_dir)
        write_auxiliary_files(files, output_dir, "converting a model of transformers' class", args.with_remote_code)
        # Raises if tensors are missing, unexpected or of another shape.
        InternVLChatModel.from_pretrained(output_dir, device_map="meta")
    print(f"Chat checkpoint: {output_dir}")
    if ignored_note := describe_ignored_by_engines(config, output_dir):
        print(f"Note: {ignored_note}")
    if args.custom_path:
        compute_l2_distance(CheckpointTensors(output_dir), CheckpointTensors(args.custom_path))


def collect_files(hf_path: str, custom_path: str | None, config: InternVLChatConfig) -> AuxiliaryFiles:
    """Collect the files of the HF checkpoint that fit a chat model, and those of a similar chat model."""
    files = read_auxiliary_files(hf_path)
    files.contents = files.select("license")
    if custom_path:
        files.contents = read_auxiliary_files(custom_path).contents | files.contents
    settings = build_preprocessor_config(get_tile_size(config), *read_normalization(hf_path))
    update_preprocessor_config(files, settings)
    return files


if __name__ == "__main__":
    main()
