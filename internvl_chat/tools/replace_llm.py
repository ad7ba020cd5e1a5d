"""Replace the LLM of a chat checkpoint.

    internvl convert replace-llm MODEL LLM

Writes MODEL_replace_llm in bfloat16. The vision encoder stays. The projector stays if both LLMs have the same hidden
size; otherwise it is initialized anew and must be trained. The tokenizer is the new LLM's, with the image tokens added.
"""

from pathlib import Path

import torch

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.constants import SPECIAL_TOKENS
from internvl.model.adapter_io import require_no_adapters
from internvl.model.auxiliary_files import (
    AuxiliaryFiles,
    compose_auxiliary_files,
    read_auxiliary_files,
    write_auxiliary_files,
)
from internvl.model.chat_template import save_tokenizer
from internvl.model.code_files import add_remote_code_flag
from internvl.model.compose import add_special_tokens, compose_chat_model
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.safetensors_io import CheckpointTensors
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tool_parser import ToolParser

# Fields of the chat configuration that do not depend on the LLM.
KEPT_CONFIG_FIELDS = (
    "pad2square select_layer force_image_size downsample_ratio template dynamic_image_size use_thumbnail ps_version "
    "min_dynamic_patch max_dynamic_patch system_message"
).split()


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("model_path", help="chat checkpoint without adapters")
    parser.add_argument("llm_path", help="checkpoint of a causal LM")
    add_remote_code_flag(parser)
    args = parser.parse_args(argv)
    model_path = require_checkpoint_dir(args.model_path, CHAT_MODEL_TYPE)
    llm_path = require_checkpoint_dir(args.llm_path)

    old_config = InternVLChatConfig.from_pretrained(model_path)
    require_no_adapters(old_config, model_path)
    tokenizer = load_tokenizer(llm_path)
    fields = {name: getattr(old_config, name) for name in KEPT_CONFIG_FIELDS if hasattr(old_config, name)}
    with create_output_dir(f"{model_path}_replace_llm") as output_dir:
        model = compose_chat_model(model_path, llm_path, dtype=torch.bfloat16, **fields)
        files = compose_auxiliary_files(read_auxiliary_files(model_path), read_auxiliary_files(llm_path))
        keep_fitting_code(model, old_config, files)
        copy_projector(model, model_path)
        add_special_tokens(model, tokenizer, SPECIAL_TOKENS)
        model.save_pretrained(output_dir)
        save_tokenizer(tokenizer, model.config, output_dir)
        write_auxiliary_files(files, output_dir, "replacing the LLM", args.with_remote_code)

    print(f"Chat checkpoint: {output_dir}")
    old_llm, new_llm = old_config.llm_config.architectures[0], model.llm_arch_name
    print(f"LLM: {new_llm} from {llm_path}")
    if old_llm != new_llm:
        print(
            f"Note: the LLM was {old_llm}; the template is still {model.template}. If the new LLM expects another one, "
            "set `template` in config.json"
        )


def keep_fitting_code(model: InternVLChatModel, old_config: InternVLChatConfig, files: AuxiliaryFiles) -> None:
    """Keep a chat checkpoint's code files if the class of its LLM is the same."""
    if model.llm_arch_name == (old_llm := old_config.llm_config.architectures[0]):
        model.config.auto_map = getattr(old_config, "auto_map", {})
    elif code := files.remove("code"):
        print(f"Note: code files that are for {old_llm} are not copied: {', '.join(code)}")


def copy_projector(model: InternVLChatModel, source: Path) -> None:
    """Copy a chat checkpoint's projector if it fits; warn otherwise."""
    tensors = CheckpointTensors(source)
    state = {name: tensors[f"mlp1.{name}"] for name in model.mlp1.state_dict()}
    old_size, new_size = state["3.bias"].numel(), model.mlp1[3].out_features  # hidden sizes of the LLMs
    if old_size == new_size:
        model.mlp1.load_state_dict(state)
    else:
        print(
            f"WARNING: the hidden size of the LLM is {new_size}, not {old_size}: the projector mlp1 has random weights "
            "and must be trained"
        )


if __name__ == "__main__":
    main()
