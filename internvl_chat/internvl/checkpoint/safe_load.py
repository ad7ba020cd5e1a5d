"""Files of torch.save in a checkpoint that a run goes on from: data is read from them, no code of theirs runs.

A pickle is a program that says which functions to call. torch reads one as data, with `weights_only`, if it calls for
nothing but tensors and types that are known to do no harm. DeepSpeed asks to read its own without; that is overruled.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError

import torch

# What torch asks the environment at every load.
FORCED, FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
SUFFIXES = (".pt", ".pth")
# What DeepSpeed's states hold beside tensors, and transformers' random numbers; by name, for DeepSpeed may be absent.
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
KNOWN = {f"{module}.{name}" for module, names in DEEPSPEED.items() for name in names}
KNOWN |= {"numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"}


@contextmanager
def weights_only_loading(deepspeed: bool) -> Iterator[None]:
    """Within it whatever loads a file of torch.save, in this process, gets data out of it or an error.

    Args:
        deepspeed: whether its types are known, too.

    Raises:
        ValueError: for a pickle that calls for more.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORBIDDEN)}
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(_types() if deepspeed else []):
            yield
    except UnpicklingError as error:
        raise ValueError(f"a file of the checkpoint holds more than data: {str(error).splitlines()[0]}") from error
    finally:
        os.environ.pop(FORCED)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refuse_unsafe_pickles(checkpoint: Path) -> None:
    """ValueError with the name of a file that would run code if it could, and what it calls; none of it is run."""
    for file in sorted(file for file in checkpoint.rglob("*") if file.suffix in SUFFIXES):
        try:
            wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        except Exception as error:  # torch's reader raises whatever broken bytes lead it to
            raise ValueError(f"{file} cannot be read as a file of torch.save: {error}") from error
        if strange := sorted(wanted - KNOWN):
            raise ValueError(
                f"{file} is no checkpoint's: opening it would call {', '.join(strange[:3])}. Nothing of it was run; do "
                "not go on from a checkpoint of this origin"
            )


def _types() -> list[type]:
    return [getattr(import_module(module), name) for module, names in DEEPSPEED.items() for name in names]
