"""Takes the projector out of a chat checkpoint: `python tools/extract_mlp.py MODEL OUT` writes OUT/mlp_projector.pth.

The file is a state dict in bfloat16, for `--mlp_path` of the training entries.
"""

import argparse
from pathlib import Path

import torch

from internvl.command_line import CHAT, checkpoint_folder, command
from internvl.model.adapter_io import has_plain_weights
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.safetensors_io import Checkpoint

PREFIX = "mlp1."


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="folder for mlp_projector.pth, made if it does not exist")
    args = parser.parse_args(argv)

    file = Path(args.output_path) / "mlp_projector.pth"
    if file.exists():
        raise ValueError(f"{file} exists: name another folder, or remove it")
    source = checkpoint_folder(args.model_path, CHAT)
    projector = {name: tensor.bfloat16() for name, tensor in sorted(projector_of(source).items())}
    if not projector:
        raise ValueError(f"{source} has no tensor named {PREFIX}*: it is no chat checkpoint")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(projector, file)
    print(f"projector: {file}")


def projector_of(source: Path) -> dict[str, torch.Tensor]:
    """The projector's state dict, its adapters merged if it has some."""
    if not has_plain_weights(InternVLChatConfig.from_pretrained(source)):
        return merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16)).mlp1.state_dict()
    tensors = Checkpoint(source)
    return {name.removeprefix(PREFIX): tensors[name] for name in tensors if name.startswith(PREFIX)}


if __name__ == "__main__":
    main()
