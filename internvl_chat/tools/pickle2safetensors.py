"""Convert pickled weights to safetensors.

    internvl convert safetensors IN OUT

IN is a folder with `pytorch_model*.bin` or `adapter_model.bin`. Nothing but tensors is unpickled: a file that would run
code is an error. The JSON, text and code files beside the weights are copied, licence and model card, too.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file

from internvl.command_line import create_output_dir, exit_on_user_error
from internvl.model.auxiliary_files import FILE_KINDS, list_inner_files, read_files, remove_dangling_auto_maps
from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors
from internvl.model.safetensors_io import save_tensors
from internvl.regular_files import copy_regular_file, open_regular_file, refuse_lfs_pointer
from internvl.tool_parser import ToolParser

COPIED_FILES = re.compile(r".+\.(?<!\.bin\.index\.)(json|txt|jinja|model)")


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("input_path", help="folder with pickled weights")
    parser.add_argument("output_path", help="new folder for the safetensors")
    args = parser.parse_args(argv)
    source = Path(args.input_path)
    model_files, adapter_files = sorted(source.glob("pytorch_model*.bin")), sorted(source.glob("adapter_model.bin"))
    if not model_files + adapter_files:
        raise ValueError(f"no pytorch_model*.bin and no adapter_model.bin in {args.input_path!r}")
    with create_output_dir(args.output_path) as output_dir, one_line_checkpoint_errors(f"the weights in {source}"):
        if model_files:
            save_tensors(load_pickled_tensors(model_files), output_dir)
        if adapter_files:
            tensors = dict(load_pickled_tensors(adapter_files))
            save_file(tensors, output_dir / ADAPTER_FILE, metadata={"format": "pt"})
        for file in list_inner_files(source, [COPIED_FILES]):
            copy_regular_file(file, output_dir / file.name)
        for name, content in read_files(source, FILE_KINDS.values()):
            (output_dir / name).write_bytes(content)
        remove_dangling_auto_maps(output_dir)
    print(f"Converted: {', '.join(file.name for file in model_files + adapter_files)}")
    print(f"Safetensors: {args.output_path}")


def load_pickled_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors, file by file.

    Tensors are cloned: safetensors files do not support tensors that share memory.

    Raises:
        ValueError: a file holds more than tensors, or a name of an earlier file.
    """
    names = set()
    for file in files:
        with open_regular_file(file) as opened:
            refuse_lfs_pointer(file, opened.read(100))
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is not readable as tensors: {str(error).splitlines()[0]}") from error
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
        ):
            raise ValueError(f"{file} is not a state dict: expected names and tensors only")
        if repeated := names & state.keys():
            raise ValueError(f"{file} holds {min(repeated)}, which an earlier file holds too")
        names |= state.keys()
        for name, tensor in state.items():
            yield name, tensor.clone()


if __name__ == "__main__":
    main()
