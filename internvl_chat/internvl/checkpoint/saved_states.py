"""Check saved states of optimizers before they are loaded.

Checkpoints are untrusted. torch copies states into its objects without comparing shapes, types or ranges: transposed
moments train wrongly without a word, and other values end the run in a traceback.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from internvl.dist_utils import is_collective_error
from internvl.regular_files import open_regular_file

ADAM_STATES = {"step", "exp_avg", "exp_avg_sq"}


@contextmanager
def one_line_state_errors(source: Path) -> Iterator[None]:
    """Turn errors of torch or DeepSpeed into one sentence naming the file.

    Errors of collectives pass, as they have other causes.
    """
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        is_own = isinstance(error, (ValueError, OSError)) and str(source) in text and text == str(error)
        if is_own or is_collective_error(error):
            raise
        if isinstance(error, UnpicklingError):  # torch's own text recommends loading the file with weights_only=False
            text = "it holds more than data and would run code. Nothing of it was run."
        raise ValueError(f"{source} cannot be loaded: {type(error).__name__}: {text:.300}") from error


def load_saved_states(file: Path, device: torch.device | str = "cpu") -> dict:
    """Load a file of `torch.save` that holds a dict, as data only.

    Raises:
        ValueError, OSError: it is missing, damaged, not a regular file or not a dict.
    """
    with one_line_state_errors(file), open_regular_file(file):
        states = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(states, dict):
            raise ValueError(f"{file} is invalid: expected a dict, got {states!r:.80}.")
        return states


def check_optimizer_states(
    saved: dict, parameters: list[torch.nn.Parameter], optimizer: Any, file: Path, global_step: int
) -> None:
    """Check the states that a file holds for parameters; its hyperparameters are not used.

    Args:
        saved: content of the file.
        parameters: in the order of the file.
        global_step: of the checkpoint.

    Raises:
        ValueError: with the name of the first wrong value.
    """
    groups = saved.get("param_groups")
    with one_line_state_errors(file):
        sizes = [len(group["params"]) for group in groups] if isinstance(groups, list) else None
        if sizes is None or sum(sizes) != len(parameters):
            found = f"states of {sum(sizes)} parameters" if sizes else f"param_groups {groups!r:.80}"
            raise ValueError(f"{file} has {found}, but this run trains {len(parameters)} parameters.")
        if error := _find_state_error(optimizer, saved.get("state"), parameters, global_step):
            raise ValueError(f"{file} is invalid: {error}.")


def find_number_error(saved: Any, own: Mapping[str, float], name: str) -> str | None:
    """Describe why saved values do not fit those of the run."""
    for key, value in own.items():
        number: Any = saved.get(key) if isinstance(saved, Mapping) else None
        types = (bool,) if isinstance(value, bool) else (int, float)
        if type(number) not in types or not abs(number) < 1e300:  # also for NaN
            return f"{name} is {saved!r:.80}, expected {', '.join(own)} as finite numbers"
    return None


def find_tensor_error(tensor: Any, shape: tuple[int, ...], name: str) -> str | None:
    """Describe why a saved tensor is not one of finite floats in this shape."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return f"{name} is {tensor!r:.80}, expected a tensor"
    if not tensor.is_floating_point() or tuple(tensor.shape) != tuple(shape):
        return f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}, expected floats {tuple(shape)}"
    return None if bool(tensor.isfinite().all()) else f"{name} has non-finite values"


def _find_state_error(optimizer: Any, saved: Any, parameters: list[torch.nn.Parameter], global_step: int) -> str | None:
    """Describe the first wrong state of a parameter."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has it as an attribute
    if not isinstance(saved, dict) or not all(type(key) is int and 0 <= key < len(parameters) for key in saved):
        return f"state is {saved!r:.80}, expected a dict with numbers of parameters below {len(parameters)}"
    is_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    if is_adam and len(saved) < len(parameters):
        return f"state has {len(saved)} parameters, expected {len(parameters)}"
    for index, states in saved.items():
        name = f"state[{index}]"
        if not isinstance(states, dict) or (is_adam and not states.keys() >= ADAM_STATES):
            return f"{name} is {states!r:.80}, expected {', '.join(sorted(ADAM_STATES))}"
        for key, value in states.items():
            if error := _find_value_error(value, parameters[index], f"{name}.{key}", is_adam):
                return error
        step = torch.as_tensor(states.get("step", 1)).flatten().tolist()
        if len(step) != 1 or not 0 <= step[0] <= global_step:
            return f"{name}.step is {step!r:.80}, expected a number from 0 to {global_step}"
    return None


def _find_value_error(value: Any, parameter: torch.nn.Parameter, name: str, is_adam: bool) -> str | None:
    if isinstance(value, dict):  # of bitsandbytes: 8-bit codes and scales
        errors = (_find_value_error(item, parameter, f"{name}.{key}", is_adam) for key, item in value.items())
        return next(filter(None, errors), None)
    if not isinstance(value, torch.Tensor):
        is_valid = value is None or type(value) is bool or (type(value) in (int, float) and math.isfinite(value))
        return None if is_valid else f"{name} is {value!r:.80}, expected a tensor or a finite number"
    # A tensor with as many elements as the parameter has its shape. Other optimizers than Adam also keep factors,
    # 8-bit codes and scales of blocks.
    is_moment = value.numel() == parameter.numel() > 1 or (is_adam and not name.endswith(".step"))
    if is_adam and name.endswith("_sq") and bool((value < 0).any()):
        return f"{name} has negative values"
    if is_adam or value.is_floating_point():
        return find_tensor_error(value, parameter.shape if is_moment else value.shape, name)
    return None if not is_moment or value.shape == parameter.shape else f"{name} has shape {tuple(value.shape)}"
