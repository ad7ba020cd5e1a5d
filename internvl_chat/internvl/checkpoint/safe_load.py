"""Read files of torch.save in an untrusted checkpoint without running code.

A pickle can call any function by name. With `weights_only=True` torch only accepts tensors and types that are known to
be safe. DeepSpeed reads its own files with `weights_only=False`, which the functions here override.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from internvl.regular_files import open_regular_file

# Environment variables that torch reads at every load.
FORCE_WEIGHTS_ONLY, FORCE_NO_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
PICKLE_SUFFIXES = (".pt", ".pth")
# Types in DeepSpeed's optimizer states besides tensors; by name, because DeepSpeed may not be installed.
DEEPSPEED_TYPES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
SAFE_GLOBALS = {f"{module}.{name}" for module, names in DEEPSPEED_TYPES.items() for name in names}
# Random states that transformers saves.
SAFE_GLOBALS |= {"numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"}
SAFE_GLOBALS |= {"numpy.ndarray", "numpy.dtype"}


@contextmanager
def weights_only_loading(deepspeed: bool) -> Iterator[None]:
    """Make every `torch.load` of this process read data only.

    Args:
        deepspeed: whether DeepSpeed's types are allowed.

    Raises:
        ValueError: a pickle requires other types or functions.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCE_WEIGHTS_ONLY, FORCE_NO_WEIGHTS_ONLY)}
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_import_deepspeed_types() if deepspeed else []):
            yield
    except UnpicklingError as error:
        # torch's own message recommends loading the file with weights_only=False.
        raise ValueError(
            "Unsafe file in the checkpoint: it holds more than data and would run code. Nothing of it was run."
        ) from error
    finally:
        os.environ.pop(FORCE_WEIGHTS_ONLY)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refuse_unsafe_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint with a pickle that would run code.

    No pickle is run.

    Raises:
        ValueError: with the name of the file and the functions that it would call.
        OSError: a file is a FIFO or device.
    """
    for file in sorted(file for file in checkpoint.rglob("*") if file.suffix in PICKLE_SUFFIXES):
        with open_regular_file(file):  # a FIFO would block below
            pass
        try:
            required = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        except Exception as error:  # for damaged files torch raises many types
            raise ValueError(f"{file} cannot be read as a file of torch.save: {error}") from error
        if unsafe := sorted(required - SAFE_GLOBALS):
            raise ValueError(
                f"Unsafe file: opening {file} would call {', '.join(unsafe[:3])}, which no training checkpoint does. "
                "Nothing of it was run. Do not resume from a checkpoint of this origin"
            )


def _import_deepspeed_types() -> list[Any]:
    return [getattr(import_module(module), name) for module, names in DEEPSPEED_TYPES.items() for name in names]
