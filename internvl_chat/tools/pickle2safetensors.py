"""Rewrites pickled weights as safetensors: `python tools/pickle2safetensors.py IN OUT`.

IN is a folder with `pytorch_model*.bin` or `adapter_model.bin`. They are read as data: tensors come out of them, and
one that would run code is an error. OUT gets the tensors, and all JSON and text files that lie beside them.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file

from internvl.command_line import command, new_folder
from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE
from internvl.model.safetensors_io import save_tensors

COPIED = ("*.json", "*.txt", "*.jinja", "*.model")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_path", help="folder with pickled weights")
    parser.add_argument("output_path", help="folder for the safetensors")
    args = parser.parse_args(argv)
    source = Path(args.input_path)
    model, adapter = sorted(source.glob("pytorch_model*.bin")), sorted(source.glob("adapter_model.bin"))
    if not model + adapter:
        raise ValueError(f"no pytorch_model*.bin and no adapter_model.bin in {args.input_path!r}")
    with new_folder(args.output_path) as folder:
        if model:
            save_tensors(tensors_of(model), folder)
        if adapter:
            save_file(dict(tensors_of(adapter)), folder / ADAPTER_FILE, metadata={"format": "pt"})
        for file in (file for pattern in COPIED for file in source.glob(pattern)):
            if not file.name.endswith(".bin.index.json"):
                shutil.copyfile(file, folder / file.name)
    print(f"{args.output_path} holds the tensors of {', '.join(file.name for file in model + adapter)}")


def tensors_of(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, file by file; names of one tensor get copies of their own."""
    for file in files:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} cannot be read as tensors: {str(error).splitlines()[0]}") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError(f"{file} holds something else than names and tensors")
        for name, tensor in state.items():
            yield name, tensor.clone()


if __name__ == "__main__":
    main()
