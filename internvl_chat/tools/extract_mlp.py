"""Takes the projector out of a chat checkpoint: `python tools/extract_mlp.py MODEL OUT` writes OUT/mlp_projector.pth.

The file is a state dict in bfloat16, for `--mlp_path` of the training entries.
"""

import argparse
from pathlib import Path

import torch

from internvl.command_line import CHAT, checkpoint_folder, command
from internvl.model.tensor_files import Checkpoint

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
    tensors = Checkpoint(checkpoint_folder(args.model_path, CHAT))
    projector = {name.removeprefix(PREFIX): tensors[name].bfloat16() for name in tensors if name.startswith(PREFIX)}
    if not projector:
        raise ValueError(f"{args.model_path} has no tensor named {PREFIX}*: it is no chat checkpoint")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(projector, file)
    print(f"projector: {file}")


if __name__ == "__main__":
    main()
