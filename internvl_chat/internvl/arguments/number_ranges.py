"""Valid ranges of numeric flags."""

import types
from dataclasses import fields
from typing import NamedTuple, Union, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """An interval of valid numbers."""

    low: float = 0
    high: float | None = None  # None: as high as a number of this type may be
    excludes_low: bool = False
    excludes_high: bool = False


HIGHEST = {int: 2**31 - 1, float: 1e12}
SHARE = Range(0, 1, excludes_high=True)
COUNT = Range(1, 2**16)
RATE = Range(0, 1000)
RATIO = Range(0, 1e6, excludes_low=True)
SEED = Range(0, 2**32 - 1)  # numpy's range
LAYER = Range(-1000, 1000)

# flag -> valid numbers; those of every other numeric flag are >= 0
RANGES = {
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": Range(0, 1),
    "backbone_layer_decay": Range(0, 10, excludes_low=True),
    "beta": Range(0, 1000, excludes_low=True),
    "data_seed": SEED,
    "dataloader_num_workers": Range(0, 1024),
    "dataloader_prefetch_factor": Range(1, 1024),
    "ddp_timeout": Range(1, 10**8),
    "early_stopping_patience": Range(1),
    "eval_max_new_tokens": Range(1),
    "eval_share": SHARE,
    "gradient_accumulation_steps": COUNT,
    "label_smoothing": Range(0, 0.5, excludes_high=True),
    "learning_rate": RATE,
    "local_rank": Range(-1),
    "logging_steps": Range(0, excludes_low=True),
    "max_image_pixels": Range(1),
    "max_seq_length": Range(1),
    "max_steps": Range(-1),
    "num_train_epochs": Range(0, 1e6),
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "save_steps": Range(0, excludes_low=True),
    "save_total_limit": Range(1),
    "seed": SEED,
    "skip_above_grad_norm": Range(0, excludes_low=True),
    "unfreeze_vit_layers": LAYER,
    "vision_select_layer": LAYER,
    "warmup_ratio": SHARE,
    "watchdog_seconds": Range(0, excludes_low=True),
    "weight_decay": RATE,
    **{f"{part}_{setting}": RATE for part in ("backbone", "mlp", "llm") for setting in ("lr", "weight_decay")},
    **{f"{part}_loraplus_lr_ratio": RATIO for part in ("backbone", "mlp", "llm")},
    # No layer of a published LLM is wider.
    **{f"use_{part}_lora": Range(0, 2**16) for part in ("backbone", "mlp", "llm")},
}


def find_numeric_flags(arguments_class: type) -> dict[str, type]:
    """Find the flags of a dataclass that take a number.

    Returns:
        Flag -> int or float.
    """
    hints, found = get_type_hints(arguments_class), {}
    for field in fields(arguments_class):
        hint = hints[field.name]
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if number_type := next((kind for kind in (int, float) if kind in members), None):
            found[field.name] = number_type
    return found


def validate_numbers(args) -> None:
    """Raise a ValueError for the first number outside its range.

    Args:
        args: an object of a dataclass of flags. None stands for a flag that is not set.
    """
    for flag, number_type in find_numeric_flags(type(args)).items():
        value = getattr(args, flag)
        if value is None:
            continue
        valid = RANGES.get(flag, Range())
        if not is_in_range(value, number_type, valid):
            raise ValueError(f"--{flag} {value!s:.80} is invalid: expected {describe_range(number_type, valid)}.")


def is_in_range(value, number_type: type, valid: Range) -> bool:
    """Check that a value is a number of a type and in a range.

    A JSON file of arguments may hold values of other types.
    """
    accepted = (int,) if number_type is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        return False
    high = HIGHEST[number_type] if valid.high is None else valid.high
    is_high_enough = valid.low < value if valid.excludes_low else valid.low <= value  # False for nan
    return is_high_enough and (value < high if valid.excludes_high else value <= high)


def describe_range(number_type: type, valid: Range) -> str:
    """Describe the valid numbers, such as "an integer from 1 to 1,024"."""
    noun = "an integer" if number_type is int else "a number"
    low, high = (f"{end:,.12g}" for end in (valid.low, HIGHEST[number_type] if valid.high is None else valid.high))
    if valid.excludes_high:
        return f"{noun} in [{low}, {high})"
    return f"{noun} > {low} and <= {high}" if valid.excludes_low else f"{noun} from {low} to {high}"
