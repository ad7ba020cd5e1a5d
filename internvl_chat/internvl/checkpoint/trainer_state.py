"""Read the trainer state of a checkpoint, which is untrusted data.

transformers sets its attributes from `trainer_state.json` without any check: a wrong `global_step` or `logging_steps`
changes the run, or ends it in a traceback many steps later.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerState

from internvl.regular_files import read_json_object

TRAINER_STATE_FILE = "trainer_state.json"  # transformers' name; every checkpoint has one
MAX_TRAINER_STATE_BYTES = 2**30  # `log_history` grows by about 1 kB for each logging step


class NumberField(NamedTuple):
    """Values of a number; None is one if `is_optional`."""

    minimum: float = 0
    is_integer: bool = True
    is_optional: bool = False


INTERVAL = NumberField(1, is_integer=False, is_optional=True)  # `--logging_steps 1` is saved as 1.0
NUMBER_FIELDS = {
    "global_step": NumberField(1),
    "max_steps": NumberField(),
    "epoch": NumberField(is_integer=False),
    "logging_steps": INTERVAL,
    "eval_steps": INTERVAL._replace(minimum=0),
    "save_steps": INTERVAL,
    "train_batch_size": NumberField(1),
    "num_train_epochs": NumberField(),
    "num_input_tokens_seen": NumberField(),
    "total_flos": NumberField(is_integer=False),
    "best_global_step": NumberField(1, is_optional=True),
    "best_metric": NumberField(-1e300, is_integer=False, is_optional=True),
}
OTHER_FIELDS = {
    "log_history": list,
    "stateful_callbacks": dict,
    "is_local_process_zero": bool,
    "is_world_process_zero": bool,
    "is_hyper_param_search": bool,
}


def parse_checkpoint_step(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name; None for another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and len(number) < 19 else None


def read_global_step(checkpoint: Path) -> int:
    """Read the step of a checkpoint to resume from, see `read_trainer_state`."""
    state = read_trainer_state(checkpoint)
    if "train_batch_size" not in state:  # transformers (5.24) divides by it
        raise ValueError(f"{checkpoint / TRAINER_STATE_FILE} is invalid: train_batch_size is missing.")
    return state["global_step"]


def read_trainer_state(checkpoint: Path) -> dict:
    """Read and check the trainer state of a checkpoint.

    Raises:
        ValueError: a value has another type or range than transformers writes, or the step is not that of the folder's
            name.
        OSError: the file is missing or not a regular file.
    """
    file = checkpoint / TRAINER_STATE_FILE
    state = read_json_object(file, max_bytes=MAX_TRAINER_STATE_BYTES)
    if error := _find_wrong_field(state) or _find_wrong_log(state):
        raise ValueError(f"{file} is invalid: {error}.")
    step, step_in_name = state["global_step"], parse_checkpoint_step(checkpoint)
    if step_in_name not in (None, step):
        raise ValueError(f"{file} is invalid: global_step is {step}, expected {step_in_name}, the step in the name.")
    best = state.get("best_model_checkpoint")  # only its name is used, see train/best_model.py
    if best is not None and (not isinstance(best, str) or parse_checkpoint_step(Path(best)) is None):
        raise ValueError(f"{file} is invalid: best_model_checkpoint is {best!r:.80}, expected a path of a checkpoint.")
    return state


def _find_wrong_field(state: dict) -> str | None:
    if unknown := sorted(state.keys() - {field.name for field in fields(TrainerState)}):
        return f"{unknown[0]!r:.80} is no field of transformers' TrainerState"
    if "global_step" not in state:
        return "global_step is missing"
    for name, field in NUMBER_FIELDS.items():
        if not _is_valid_number(value := state.get(name, field.minimum), field):
            kind = "an integer" if field.is_integer else "a finite number"
            return f"{name} is {value!r:.80}, expected {kind} >= {field.minimum}"
    if (best_step := state.get("best_global_step") or 0) > state["global_step"]:
        return f"best_global_step is {best_step}, expected at most global_step {state['global_step']}"
    for name, expected in OTHER_FIELDS.items():
        if not isinstance(value := state.get(name, expected()), expected):
            return f"{name} is {value!r:.80}, expected a JSON {expected.__name__}"
    return None


def _is_valid_number(value: Any, field: NumberField) -> bool:
    if value is None:
        return field.is_optional
    is_number = type(value) is int or (type(value) is float and not field.is_integer)
    return is_number and field.minimum <= value < (2**63 if field.is_integer else 1e300)  # False for NaN


def _find_wrong_log(state: dict) -> str | None:
    for index, entry in enumerate(state.get("log_history", [])):
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            return f"log_history[{index}] is {entry!r:.80}, expected an object with an integer step"
    return None
