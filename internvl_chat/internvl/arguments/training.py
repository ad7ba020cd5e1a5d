"""Flags of the training loop, and the parser of all flags.

`ModelArguments`, `DataTrainingArguments` and `TrainingArguments` have upstream's names, flags and defaults. Flags that
transformers 5 removed but upstream's recipes still pass are declared here, so every recipe parses unchanged.
"""

import json
import sys
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
import transformers
from transformers.training_args import trainer_log_levels

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.deepspeed_config import get_zero_stage, load_deepspeed_config
from internvl.arguments.evaluation import EvaluationArguments
from internvl.arguments.evaluation_strategy import prepare_evaluation_flags
from internvl.arguments.fault_tolerance import FaultToleranceArguments
from internvl.arguments.flags import (
    OneLineErrorParser,
    advise_unknown_flag,
    describe_unknown_words,
    option,
    require,
)
from internvl.arguments.model import ModelArguments
from internvl.arguments.number_ranges import validate_numbers
from internvl.arguments.optimizers import refuse_unsupported_optimizer, try_optimizer
from internvl.arguments.per_part import PartRateArguments
from internvl.arguments.reporters import validate_reporters
from internvl.arguments.run_file import RunFlag, expand_run_files, format_flag, is_json_file
from internvl.arguments.schedulers import validate_scheduler
from internvl.arguments.unsupported_flags import REMOVED_FLAGS, refuse_unsupported_flags
from internvl.regular_files import read_json_object

# transformers has `activation_checkpointing_kwargs` since 5.23.
JSON_FLAGS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")


@dataclass
class TrainingArguments(
    transformers.TrainingArguments, PartRateArguments, FaultToleranceArguments, EvaluationArguments
):
    """transformers' `TrainingArguments` with the flags and defaults of this trainer."""

    # Removed in transformers 5.
    evaluation_strategy: str | None = option(None, "former name of --eval_strategy")
    overwrite_output_dir: bool = option(False, "start from scratch even if --output_dir has checkpoints")
    group_by_length: bool = option(False, "put samples of similar length into the same step")
    warmup_ratio: float | None = option(None, "share of the steps used for warmup")
    # Flags of transformers with another default.
    remove_unused_columns: bool = option(False, "ignored: batches have only what the model takes")
    ddp_find_unused_parameters: bool | None = option(False, "every trainable parameter gets a gradient in every step")
    ddp_timeout: int = option(3600, "seconds that ranks wait for each other before the run fails")
    log_level: str = option("error", "log level of transformers; this package always logs at info level")
    log_level_replica: str = option("error", "log level of transformers on ranks other than 0")
    logging_nan_inf_filter: bool = option(False, "hide non-finite losses in the log")
    optim: str = option("adamw_torch_fused", "optimizer, a name of transformers; by default AdamW in one kernel")
    use_cpu: bool = option(not torch.cuda.is_available(), "train on the CPU")
    do_train: bool = option(
        True, "False: set up everything, log the trainable parameters, evaluate if --do_eval is True, and exit"
    )
    # Flags that only this trainer has.
    backbone_layer_decay: float | None = option(
        None, "layer-wise learning rate decay of unfrozen vision encoder layers: rate / that of the layer above"
    )
    lora_fp32: bool = option(False, "keep and optimize trainable parameters in fp32 while the base model is bf16")
    save_full_model: bool = option(
        False, "save LoRA runs as the full model in upstream's layout instead of the trained parameters only"
    )
    no_smoke_save: bool = option(False, "do not test writing and reading a checkpoint before the first step")

    def __post_init__(self):
        self.take_former_strategy()
        validate_numbers(self)
        refuse_unsupported_flags(self)
        refuse_unsupported_optimizer(self)
        if isinstance(self.report_to, str):
            self.report_to = [name.strip() for name in self.report_to.split(",")]
        validate_reporters(self.report_to)
        self.validate_fault_tolerance()
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # transformers 5 takes a value below 1 as a share
        for flag in ("log_level", "log_level_replica"):
            require(self, flag, getattr(self, flag) in trainer_log_levels, f"one of {', '.join(trainer_log_levels)}")
        if not self.output_dir:
            raise ValueError("--output_dir is required: the folder for checkpoints and logs.")
        for flag in filter(partial(hasattr, self), JSON_FLAGS):
            setattr(self, flag, parse_json_flag(self, flag))
        prepare_evaluation_flags(self)
        if self.deepspeed:
            self.deepspeed = load_deepspeed_config(self.deepspeed, self)
        if self.lora_fp32:
            self.enable_lora_fp32()
        super().__post_init__()
        try_optimizer(self)
        validate_scheduler(self)

    def take_former_strategy(self):
        """Take `--evaluation_strategy` as `--eval_strategy`.

        Recipes pass `no`, and flags after the recipe may name a strategy.
        """
        former, given = self.evaluation_strategy, str(getattr(self.eval_strategy, "value", self.eval_strategy))
        if former is None or former in ("no", given):
            return
        if given != "no":
            raise ValueError(f"--evaluation_strategy {former} contradicts --eval_strategy {given}: remove one of them.")
        self.eval_strategy = former

    def enable_lora_fp32(self):
        """Keep trainable parameters in fp32 under DeepSpeed, by its autocast.

        Without DeepSpeed they are always fp32. DeepSpeed's bf16 mode casts all parameters to bf16; its autocast, which
        replaces that mode here, casts inputs and weights layer by layer.
        """
        if not self.bf16:
            raise ValueError("--lora_fp32 True requires --bf16 True: it is for fp32 parameters in a bf16 model.")
        if not self.deepspeed:
            return
        assert isinstance(self.deepspeed, dict)  # loaded in `__post_init__`
        if get_zero_stage(self.deepspeed) == 3:
            raise ValueError(
                "--lora_fp32 True is not supported under ZeRO-3, which loads all weights in one dtype: remove the "
                "flag (the optimizer has fp32 master weights), or use ZeRO-2."
            )
        self.bf16 = False
        self.deepspeed |= {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def parse_json_flag(args, flag: str) -> dict | None:
    """Parse a flag whose value is a JSON object.

    Raises:
        ValueError: the value is not a JSON object.
    """
    value = getattr(args, flag)
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = value
    require(args, flag, parsed is None or isinstance(parsed, dict), "a JSON object, such as '{\"key\": 1}'")
    return parsed


NOT_GIVEN = object()  # in place of a default
FINETUNE_ARGUMENTS = (ModelArguments, DataTrainingArguments, TrainingArguments)


def parse_args(argv: list[str] | None = None, classes: tuple[type, ...] = FINETUNE_ARGUMENTS) -> tuple:
    """Parse a command line, or one `.json` file of arguments.

    Args:
        argv: default: the command line of this program. `--config FILE` stands for the flags of a YAML file.

    Returns:
        One object per class.

    Raises:
        ValueError: a flag is unknown or its value invalid.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineErrorParser(classes)
    if is_json_file(argv):
        parsed, unknown = parser.parse_json_file(argv[0]), []
    else:
        argv = expand_run_files(argv, partial(make_words, parser))
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    for args in parsed:
        validate_numbers(args)
    if unknown:
        raise ValueError(describe_unknown_words(unknown, argv, parser.flag_names, REMOVED_FLAGS))
    return tuple(parsed)


def make_words(parser: OneLineErrorParser, path: str, name: str, flag: RunFlag) -> list[str]:
    """Convert a flag of a YAML file to words of a command line.

    Raises:
        ValueError: the flag is unknown or its value has the wrong type; the message has file and line.
    """
    place, known = f"{path}, line {flag.line}", parser.flag_names
    if name not in known:
        raise ValueError(f"{place}: unknown flag: {name!r:.80}{advise_unknown_flag(name, known, REMOVED_FLAGS)}")
    try:
        if isinstance(flag.value, list):
            words = [f"--{name}", *flag.value]
            if not parser.parse_known_args(words)[1]:
                return words
        words = [format_flag(name, flag.value)]  # of most lists: one text with commas, such as --report_to's
        parser.parse_known_args(words)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return words


def list_given_flags(argv: list[str], classes: tuple[type, ...]) -> dict[str, str | list[str]]:
    """List the flags that a command line gives, without defaults, for `run.yaml`.

    Secrets, and the rank that a launcher passes, are left out.

    Args:
        argv: a command line that `parse_args` accepts.
    """
    if is_json_file(argv):
        given = read_json_object(argv[0])
    else:
        parser = OneLineErrorParser(classes)
        parser.set_defaults(**dict.fromkeys(parser.flag_names, NOT_GIVEN))
        given = vars(parser.parse_known_args(expand_run_files(argv, partial(make_words, parser)))[0])
    kept = {name: value for name, value in given.items() if value is not NOT_GIVEN and value is not None}
    return {name: _format_value(value) for name, value in kept.items() if not is_of_process(name)}


def is_of_process(flag: str) -> bool:
    """Return whether a flag is a secret, or differs between ranks."""
    return flag.endswith("_token") or flag == "local_rank"


def _format_value(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [str(_format_value(item)) for item in value]
    if isinstance(value, dict):  # of a .json file
        return json.dumps(value)
    return str(value.value if isinstance(value, Enum) else value)
