"""Puts another language model into a chat checkpoint: `python tools/replace_llm.py MODEL LLM` writes MODEL_replace_llm.

The vision encoder stays. So does the projector, if the new model is as wide as the old one; else a fresh one takes its
place and has to be trained. Tokenizer: the new model's, with the image tokens added. Saved in bfloat16.
"""

import argparse
from pathlib import Path

import torch

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.constants import SPECIAL_TOKENS
from internvl.model.adapter_io import refuse_adapters
from internvl.model.compose import add_special_tokens, compose
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.safetensors_io import Checkpoint
from internvl.model.tokenizers.loading import load_tokenizer

# What a chat checkpoint's configuration says about the vision encoder and the pictures, not about the language model.
KEPT = (
    "pad2square select_layer force_image_size downsample_ratio template dynamic_image_size use_thumbnail ps_version "
    "min_dynamic_patch max_dynamic_patch system_message"
).split()


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("llm_path", help="causal language model")
    args = parser.parse_args(argv)
    model_path, llm_path = checkpoint_folder(args.model_path, CHAT), checkpoint_folder(args.llm_path)

    old = InternVLChatConfig.from_pretrained(model_path)
    refuse_adapters(old, model_path)
    tokenizer = load_tokenizer(llm_path)
    kept = {name: getattr(old, name) for name in KEPT if hasattr(old, name)}
    with new_folder(f"{model_path}_replace_llm") as folder:
        model = compose(model_path, llm_path, dtype=torch.bfloat16, **kept)
        keep_projector(model, model_path)
        add_special_tokens(model, tokenizer, SPECIAL_TOKENS)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    before, after = old.llm_config.architectures[0], model.llm_arch_name
    if before != after:
        print(
            f"note: the language model was {before} and is {after}; the template stays {model.template}: "
            "set `template` in config.json to the new model's own, if that differs"
        )
    print(f"checkpoint with {after} of {llm_path}: {folder}")


def keep_projector(model: InternVLChatModel, path: Path) -> None:
    """Gives the model the projector of the chat checkpoint `path`, if it fits; says so if not."""
    tensors = Checkpoint(path)
    old = {name: tensors[f"mlp1.{name}"] for name in model.mlp1.state_dict()}
    before, now = old["3.bias"].numel(), model.mlp1[3].out_features
    if before == now:
        model.mlp1.load_state_dict(old)
    else:
        print(
            f"WARNING: the language model is {now} wide instead of {before}: the projector mlp1 starts afresh with "
            "random weights, and the model sees nothing before it is trained"
        )


if __name__ == "__main__":
    main()
