"""Convert a chat checkpoint to transformers' `InternVLForConditionalGeneration`.

    internvl convert to-hf --custom_path CHAT --save_path HF [--hf_path REFERENCE]

Tensors are converted one by one without building a model: a checkpoint of several files needs the memory of one.
`AutoModelForImageTextToText` and `AutoProcessor` load the result. A checkpoint with adapters is first merged in memory
and saved in a temporary folder beside the result. With --hf_path, the L2 distance from that checkpoint is printed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForImageTextToText

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.model.adapter_io import has_adapters
from internvl.model.auxiliary_files import AuxiliaryFiles, read_auxiliary_files, write_auxiliary_files
from internvl.model.combine_adapters import save_merged_checkpoint
from internvl.model.hf.config import convert_config_to_hf, save_hf_config
from internvl.model.hf.processor import save_processor
from internvl.model.hf.weights import convert_weights_to_hf, is_head_tied, normalize_hf_key
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.safetensors_io import CheckpointTensors, StateDict, compute_l2_distance, save_tensors
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tool_parser import ToolParser


def convert_keys_to_hf(custom_state_dict: StateDict, llm_config=None) -> dict[str, torch.Tensor]:
    """Convert a chat model's state dict to the HF format.

    Args:
        llm_config: required for InternLM2.
    """
    return dict(convert_weights_to_hf(custom_state_dict, llm_config))


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("--custom_path", required=True, help="chat checkpoint")
    parser.add_argument("--hf_path", help="HF checkpoint to compare the result with")
    parser.add_argument("--save_path", required=True, help="new folder for the HF checkpoint")
    args = parser.parse_args(argv)

    reference = CheckpointTensors(args.hf_path, normalize_hf_key) if args.hf_path else None
    source = require_checkpoint_dir(args.custom_path, CHAT_MODEL_TYPE)
    files = read_auxiliary_files(source)
    with merge_if_adapted(source, Path(args.save_path)) as merged_dir:
        convert_checkpoint(merged_dir, args.save_path, files)
    print(f"HF checkpoint: {args.save_path}")
    if reference:
        compute_l2_distance(CheckpointTensors(args.save_path), reference)


@contextmanager
def merge_if_adapted(source: Path, save_path: Path) -> Iterator[Path]:
    """Yield the checkpoint, or a temporary merged copy if it has adapters."""
    if not has_adapters(InternVLChatConfig.from_pretrained(source)):
        yield source
        return
    save_path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=save_path.parent, prefix=".merged-") as folder:
        print(f"Merging the adapters of {source}")
        model = merge_adapters(InternVLChatModel.from_pretrained(source, dtype="auto"))
        save_merged_checkpoint(model, source, folder)
        yield Path(folder)


def convert_checkpoint(source: Path, save_path: str, files: AuxiliaryFiles) -> None:
    """Convert a chat checkpoint without adapters.

    Args:
        files: besides the weights, for the result.
    """
    config, custom = InternVLChatConfig.from_pretrained(source), CheckpointTensors(source)
    # InternVLChatConfig sets tie_word_embeddings to False unless both configurations have it: read what is stored.
    stored_config = config.get_config_dict(source)[0]
    declared = any(c.get("tie_word_embeddings") for c in (stored_config, stored_config["llm_config"]))
    is_tied = is_head_tied(custom, declared)
    hf_config = convert_config_to_hf(config, get_image_token_id(source), is_tied)
    if config.dynamic_image_size and not config.use_thumbnail:
        print("Note: use_thumbnail False is ignored by transformers' processor: it adds a thumbnail to several tiles")
    if config.pad2square:
        print("Note: pad2square True is ignored by transformers' processor: it does not pad")
    if config.select_layer != -1:
        print(f"Note: select_layer {config.select_layer} is ignored by vLLM 0.32, whose answers are others than these")

    with create_output_dir(save_path) as output_dir:
        save_tensors(convert_weights_to_hf(custom, config.llm_config, is_tied), output_dir)
        save_hf_config(hf_config, output_dir)
        save_processor(config, source, output_dir)
        write_auxiliary_files(files, output_dir, "converting it to transformers' own class")
        check_loadable(output_dir)


def get_image_token_id(path: Path) -> int:
    """Return the id of `<IMG_CONTEXT>`; ValueError if the tokenizer lacks it."""
    vocabulary = load_tokenizer(path).get_vocab()
    if IMG_CONTEXT_TOKEN not in vocabulary:
        raise ValueError(
            f"the tokenizer in {str(path)!r} has no token {IMG_CONTEXT_TOKEN}: it is not a chat model's tokenizer"
        )
    return vocabulary[IMG_CONTEXT_TOKEN]


def check_loadable(folder: Path) -> None:
    """Raise a ValueError if tensors are missing, unexpected or of another shape."""
    _, info = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    # `missing_keys`, `unexpected_keys`, ... -> `missing`, `unexpected`, ...
    problems = [f"{kind.removesuffix('_keys')}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    if problems:
        raise ValueError(f"the converted weights do not fit transformers' class: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
