"""Save and load the states of a run: optimizer, scheduler, loss scaler.

A checkpoint's states are loaded, but not the hyperparameters that they were saved with: learning rates, weight decay
and so on are those of the flags (`checkpoint/resume_rules.py`). With unchanged flags they are the same numbers.
"""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME

from internvl.arguments.evaluation_strategy import LOG_PREFIX
from internvl.arguments.optimizers import ADAMW
from internvl.arguments.schedulers import NEED_METRIC
from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.manifest import find_checkpoint_errors, summarize_errors
from internvl.checkpoint.optimizer_state import load_engine_states, save_optimizer_states
from internvl.checkpoint.resume_rules import FLAGS_FILE, RULES, TAKEN, read_flags_file
from internvl.checkpoint.safe_load import refuse_unsafe_pickles
from internvl.checkpoint.saved_states import (
    check_optimizer_states,
    find_number_error,
    load_saved_states,
    one_line_state_errors,
)
from internvl.dist_utils import run_on_rank_0
from internvl.evaluation.results import METRIC_PREFIX
from internvl.model.adapter_io import require_finite
from internvl.model.auxiliary_files import write_auxiliary_files
from internvl.model.chat_template import save_tokenizer
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    gather_trained_tensors,
    is_adapter_checkpoint,
    load_trained_tensors,
    read_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.zero3 import gathered_parameters
from internvl.planning.data_state import read_world_size
from internvl.train.param_groups import build_param_groups, count_elements
from internvl.train.step_guard import check_weights_finite

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)
# What a scheduler that follows a metric has counted; its other states are arguments.
METRIC_SCHEDULER_STATES = (
    "best",
    "num_bad_epochs",
    "num_good_epochs",
    "cooldown_counter",
    "warmup_counter",
    "reset_start",
    "last_epoch",
)


def save_weights(trainer: "InternVLTrainer", folder: Path, save_all_fn: Callable[[], None]) -> None:
    """Save the trained weights, tokenizer and other files of a checkpoint. A collective.

    Args:
        save_all_fn: transformers' saving of all weights.

    Raises:
        ValueError: on every rank, if a weight is not finite.
    """
    model, is_writer = trainer.model, trainer.args.should_save
    check_weights_finite(trainer.get_trainable_parameters(), trainer.state.global_step)
    if trainer.saves_adapters_only:
        tensors = gather_trained_tensors(model)
        if is_writer:
            save_adapter_checkpoint(model, folder, tensors)
            torch.save(trainer.args, folder / "training_args.bin")
    else:
        save_all_fn()
    if is_writer:
        save_tokenizer(trainer.processing_class, model.config, folder)
        write_auxiliary_files(trainer.auxiliary_files, folder, "fine-tuning")
        trainer.run_record.save(folder, model.base_checkpoint)


def load_weights(trainer: "InternVLTrainer", checkpoint: Path) -> None:
    """Load the weights of a checkpoint, and no other state. A collective."""
    if is_adapter_checkpoint(checkpoint):
        load_trained_tensors(trainer.model, checkpoint, trainer.get_trainable_parameters())
    else:
        load_full_checkpoint(trainer.model, checkpoint)


def load_best_weights(trainer: "InternVLTrainer", checkpoint: Path) -> None:
    """Load the weights of the best checkpoint, after the last step. A collective.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    run_on_rank_0(lambda: refuse_unsafe_pickles(checkpoint))
    if errors := find_checkpoint_errors(checkpoint):
        raise ValueError(
            f"The best checkpoint {checkpoint} is damaged: {summarize_errors(errors)}. --load_best_model_at_end False "
            "saves the model of the last step."
        )
    load_weights(trainer, checkpoint)
    args, metric = trainer.args, trainer.state.best_metric
    name = METRIC_PREFIX + str(args.metric_for_best_model).removeprefix(LOG_PREFIX)
    logger.info("Loaded the best model: %s (%s %.4f)", checkpoint.name, name, metric)


def save_engine_states(trainer: "InternVLTrainer", folder: Path) -> None:
    """Save the states of a DeepSpeed run that trains adapters. A collective."""
    engine = trainer.model_wrapped
    if engine.zero_optimization() and trainer.args.optim in ADAMW:
        save_optimizer_states(engine, trainer.get_trainable_parameters(), folder, trainer.args.should_save)
    else:
        engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)


def write_trial_checkpoint(trainer: "InternVLTrainer") -> None:
    """Write and read a checkpoint before the first step. A collective."""

    def write_fn(folder: Path) -> None:
        trainer.save_model(str(folder), _internal_call=True)
        trainer._save_optimizer_and_scheduler(str(folder))

    def verify_fn(folder: Path) -> None:
        if trainer.saves_adapters_only:
            read_trained_tensors(trainer.model, folder)

    parameters = trainer.get_trainable_parameters().values()
    trainer.checkpoints.write_trial_checkpoint(write_fn, verify_fn, sum(map(count_elements, parameters)))


def load_training_states(trainer: "InternVLTrainer", checkpoint: Path) -> None:
    """Load all states of a checkpoint, under DeepSpeed also the weights. A collective."""
    # The rates of the run that wrote the checkpoint determine its parameter groups.
    flags = (run_on_rank_0(lambda: read_flags_file(checkpoint)) or {}).get("flags", {})
    with one_line_state_errors(checkpoint / FLAGS_FILE):
        groups = build_param_groups(trainer.model, replace_flags(trainer.args, flags))
    # States are loaded to their device if each rank has one, else to the CPU first.
    args, step = trainer.args, trainer.state.global_step
    device = args.device if args.world_size > 1 and args.device.type != "cpu" else "cpu"
    with keep_hyperparameters(trainer.optimizer):
        if trainer.is_deepspeed_enabled:
            own_sizes = get_group_sizes(build_param_groups(trainer.model, args))
            load_engine_checkpoint(trainer, checkpoint, has_same_groups=get_group_sizes(groups) == own_sizes)
        else:
            saved = load_saved_states(file := checkpoint / OPTIMIZER_NAME, device)
            check_optimizer_states(saved, list_parameters(groups), trainer.optimizer, file, step)
            trainer.optimizer.load_state_dict(assign_states(saved, groups, trainer.optimizer))
    saved = load_saved_states(file := checkpoint / SCHEDULER_NAME)
    if type(num_steps := saved.get("last_epoch")) is not int or not 0 <= num_steps <= step:
        raise ValueError(f"{file} is invalid: last_epoch is {num_steps!r:.80}, expected an integer from 0 to {step}.")
    if args.lr_scheduler_type in NEED_METRIC:
        restore_metric_scheduler(trainer, saved, file, groups)
    else:  # a saved scheduler that followed a metric has counted evaluations
        set_scheduler_step(trainer.lr_scheduler, step if "num_bad_epochs" in saved else num_steps)
    if (checkpoint / SCALER_NAME).is_file():
        saved = load_saved_states(file := checkpoint / SCALER_NAME)
        with one_line_state_errors(file):
            scaler: Any = trainer.accelerator.scaler  # accelerate declares None, which fp16 replaces
            if error := find_number_error(saved, scaler.state_dict(), "the loss scaler"):
                raise ValueError(f"{file} is invalid: {error}.")
            scaler.load_state_dict(saved)


def load_full_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """Load all weights of a checkpoint into a model of the same structure.

    transformers' own loading for a resumed run skips whatever is missing or has another name, such as the experts of a
    mixture, whose weights have other names in files than in memory.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite.
    """
    # Parameters may have different precisions in memory: float32 holds all of them.
    saved = InternVLChatModel.from_pretrained(folder, dtype=torch.float32)
    require_finite(saved.state_dict(), folder)
    with one_line_state_errors(Path(folder)):
        if is_deepspeed_zero3_enabled():  # the parameters of both models are partitioned
            copy_partitioned_parameters(saved, model)
        else:
            model.load_state_dict(saved.state_dict())


def copy_partitioned_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of a model to one of the same structure, under ZeRO-3. A collective."""
    saved = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        with gathered_parameters(parameter, saved[name]), torch.no_grad():
            parameter.copy_(saved[name])


def load_engine_checkpoint(trainer: "InternVLTrainer", checkpoint: Path, has_same_groups: bool) -> None:
    """Load weights and optimizer states into the DeepSpeed engine.

    transformers' own loading requires frozen weights in the checkpoint and the same number of ranks.
    """
    has_adapters_only = is_adapter_checkpoint(checkpoint)
    if has_adapters_only:
        load_trained_tensors(trainer.model, checkpoint, trainer.get_trainable_parameters())
    load_engine_states(
        trainer.model_wrapped,
        trainer.get_trainable_parameters(),
        checkpoint,
        is_rank_0=trainer.args.process_index == 0,
        strict=not has_adapters_only,
        global_step=trainer.state.global_step,
        has_same_groups=has_same_groups,
    )


def find_random_states(checkpoint: Path, args: TrainingArguments) -> Path:
    """Return the file of this rank's random states, which may not exist.

    Raises:
        ValueError: it is missing, although the checkpoint was written by as many ranks.
    """
    file = checkpoint / (f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth")
    if not file.exists() and read_world_size(checkpoint) == args.world_size:
        raise ValueError(f"{file} is missing: the run cannot continue with the same random numbers.")
    return file


@contextmanager
def keep_hyperparameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Restore the hyperparameters of an optimizer's groups after a block that loads it."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def set_scheduler_step(scheduler: Any, num_steps: int) -> None:
    """Set the learning rates to those after a number of steps.

    They are a function of that number and the rates of the flags, so nothing else of a saved scheduler is needed.
    """
    scheduler.last_epoch = num_steps - 1  # `step` adds 1 and computes the rates
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        scheduler.step()


def restore_metric_scheduler(trainer: "InternVLTrainer", saved: dict, file: Path, saved_groups: list[dict]) -> None:
    """Restore a scheduler that changes the rates by a metric, and the rates.

    With another metric, or another kind of scheduler, it starts anew; with other rates in the flags, from these.

    Args:
        saved_groups: parameter groups with the rates of the saved flags.
    """
    scheduler = trainer.lr_scheduler
    own = {name: value for name, value in vars(scheduler).items() if name in METRIC_SCHEDULER_STATES}
    if not trainer.best_model.is_comparable or saved.get("mode") != scheduler.mode or not saved.keys() >= own.keys():
        return
    groups, rates = scheduler.optimizer.param_groups, saved.get("_last_lr")
    numbers, expected = {name: saved[name] for name in own}, dict(own)
    if numbers["best"] in (math.inf, -math.inf):  # before the first evaluation
        del numbers["best"]
    del expected["best"]
    if keeps_rates := [group["lr"] for group in saved_groups] == [group["lr"] for group in groups]:
        numbers |= {f"rate {i}": rate for i, rate in enumerate(rates)} if isinstance(rates, list) else {}
        expected |= {f"rate {i}": 0.0 for i in range(len(groups))}
    if error := find_number_error(numbers, expected | dict.fromkeys(numbers, 0.0), "the scheduler"):
        raise ValueError(f"{file} is invalid: {error}.")
    for i, group in enumerate(groups if keeps_rates else []):
        group["lr"] = numbers[f"rate {i}"]
    scheduler.load_state_dict({name: saved[name] for name in own} | {"_last_lr": [group["lr"] for group in groups]})


def assign_states(saved: dict, saved_groups: list[dict], optimizer: torch.optim.Optimizer) -> dict:
    """Assign saved states to the parameters of an optimizer whose groups may differ.

    Args:
        saved: `state_dict` of the optimizer of `saved_groups`. It numbers the parameters in the order of its groups.

    Returns:
        The `state_dict` to load into `optimizer`, with its own hyperparameters.

    Raises:
        ValueError: the states are of other groups.
    """
    if (sizes := get_group_sizes(saved["param_groups"])) != (expected := get_group_sizes(saved_groups)):
        raise ValueError(
            f"The checkpoint has optimizer states of groups of {sizes} parameters, but its flags give {expected}: "
            "resume with the rates that it was trained with."
        )
    saved_order, order = list_parameters(saved_groups), list_parameters(optimizer.param_groups)
    index = {id(parameter): i for i, parameter in enumerate(saved_order)}
    old_indices = [index[id(parameter)] for parameter in order]
    states = {new: saved["state"][old] for new, old in enumerate(old_indices) if old in saved["state"]}
    return optimizer.state_dict() | {"state": states}


def get_group_sizes(groups: list[dict]) -> list[int]:
    return [len(group["params"]) for group in groups]


def list_parameters(groups: list[dict]) -> list:
    return [parameter for group in groups for parameter in group["params"]]


def replace_flags(args: TrainingArguments, flags: Mapping[str, Any]) -> TrainingArguments:
    """Copy arguments with the values of other flags, without validating them."""
    copied = copy.copy(args)
    vars(copied).update({name: value for name, value in flags.items() if RULES.get(name) == TAKEN})
    return copied
