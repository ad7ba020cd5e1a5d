"""Extract the projector of a chat checkpoint.

    internvl convert extract-mlp MODEL OUT

Writes OUT/mlp_projector.pth, a state dict in bfloat16 for `--mlp_path` of the training programs, and copies licence
files. Adapters are merged first.
"""

from pathlib import Path

import torch

from internvl.command_line import CHAT_MODEL_TYPE, exit_on_user_error, require_checkpoint_dir
from internvl.model.adapter_io import has_adapters
from internvl.model.auxiliary_files import write_license_files
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.safetensors_io import CheckpointTensors
from internvl.tool_parser import ToolParser

PROJECTOR_PREFIX = "mlp1."


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("model_path", help="chat checkpoint")
    parser.add_argument("output_path", help="folder for mlp_projector.pth, created if missing")
    args = parser.parse_args(argv)

    output_file = Path(args.output_path) / "mlp_projector.pth"
    if output_file.exists():
        raise ValueError(f"{output_file} exists: choose another folder or remove the file")
    source = require_checkpoint_dir(args.model_path, CHAT_MODEL_TYPE)
    state = {name: tensor.bfloat16() for name, tensor in sorted(read_projector(source).items())}
    if not state:
        raise ValueError(f"{source} has no tensor named {PROJECTOR_PREFIX}*: it is not a chat checkpoint")
    output_file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, output_file)
    write_license_files(source, output_file.parent)
    print(f"Projector: {output_file}")


def read_projector(source: Path) -> dict[str, torch.Tensor]:
    """Return the projector's state dict, with merged adapters."""
    if has_adapters(InternVLChatConfig.from_pretrained(source)):
        return merge_adapters(InternVLChatModel.from_pretrained(source, dtype=torch.bfloat16)).mlp1.state_dict()
    tensors = CheckpointTensors(source)
    names = [name for name in tensors if name.startswith(PROJECTOR_PREFIX)]
    return {name.removeprefix(PROJECTOR_PREFIX): tensors[name] for name in names}


if __name__ == "__main__":
    main()
