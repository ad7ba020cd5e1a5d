"""Optimizers: which of transformers' are supported, with which arguments."""

import math

import torch
import transformers
from transformers.training_args import OptimizerNames

from internvl.arguments.flags import require
from internvl.versions import require_package

ADAMW = ("adamw_torch", "adamw_torch_fused")
ADEMAMIX = ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit")
BITSANDBYTES = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", *ADEMAMIX),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
SUPPORTED_OPTIMIZERS = (*ADAMW, "adafactor", "sgd", "adagrad", "rmsprop", *BITSANDBYTES)

# optimizers -> reason
UNSUPPORTED_OPTIMIZERS = {
    (
        *("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
        *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        *("apollo_adamw", "apollo_adamw_layerwise"),
    ): "it groups the parameters by --optim_target_modules, not by part; use LoRA to save memory",
    ("lomo", "adalomo"): "it updates weights during the backward pass, where gradients are neither accumulated over "
    "micro-batches nor clipped",
    ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"): "it must switch between two sets of weights "
    "before each checkpoint, which this trainer does not do",
    ("adamw_torch_4bit", "adamw_torch_8bit"): "it requires torchao, which this trainer is not tested with; use "
    "adamw_bnb_8bit",
    ("stable_adamw",): "it requires torch-optimi, which this trainer is not tested with",
    ("grokadamw",): "it requires grokadamw, which this trainer is not tested with",
    ("adamw_anyprecision",): "it requires torchdistx, which is no longer maintained",
    ("adamw_torch_xla",): "it is for TPUs",
    ("adamw_torch_npu_fused",): "it is for Ascend NPUs",
}
# optimizer -> reason why it is not supported under DeepSpeed, which gives it flat shares of the parameters
UNSUPPORTED_WITH_DEEPSPEED = {
    "adafactor": "it factors the statistics of each weight matrix, which DeepSpeed flattens",
    "adagrad": "DeepSpeed creates it anew, without the parameter groups of the parts",
}
# optimizer -> arguments that transformers passes on
OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(ADEMAMIX, ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
}


def refuse_unsupported_optimizer(args: transformers.TrainingArguments) -> None:
    """Raise a ValueError if the optimizer is not supported, or its package missing."""
    name = str(getattr(args.optim, "value", args.optim))  # an enum if parsed from the command line
    for names, reason in UNSUPPORTED_OPTIMIZERS.items():
        if name in names:
            raise ValueError(f"--optim {name} is not supported: {reason}.")
    require(args, "optim", name in SUPPORTED_OPTIMIZERS, f"one of {', '.join(SUPPORTED_OPTIMIZERS)}")
    if args.deepspeed and name in UNSUPPORTED_WITH_DEEPSPEED:
        raise ValueError(f"--optim {name} is not supported with --deepspeed: {UNSUPPORTED_WITH_DEEPSPEED[name]}.")
    if name in BITSANDBYTES:
        require_package("bitsandbytes", f"--optim {name}")
    if args.optim_args:
        validate_optim_args(args.optim_args, name)


def validate_optim_args(optim_args: str, name: str) -> None:
    """Check that arguments of an optimizer are known numbers."""
    if name in ADAMW:
        raise ValueError(
            f"--optim_args {optim_args} is not supported with AdamW: use --adam_beta1, --adam_beta2 and --adam_epsilon."
        )
    known = OPTIM_ARGS.get(name, ())
    if not known:
        raise ValueError(f"--optim_args {optim_args} is not supported with --optim {name}: remove it.")
    for argument in optim_args.replace(" ", "").split(","):
        key, _, value = argument.partition("=")
        if key not in known or not (value.lower() in ("true", "false") or _is_finite_number(value)):
            raise ValueError(
                f"--optim_args {optim_args} is invalid with --optim {name}: expected KEY=NUMBER,... with keys "
                f"among {', '.join(known)}."
            )


def _is_finite_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def try_optimizer(args: transformers.TrainingArguments) -> None:
    """Create the optimizer of one parameter, to find invalid arguments early.

    Raises:
        ValueError: the optimizer does not accept its arguments.
    """
    try:
        optimizer_class, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer_class([torch.zeros(1, requires_grad=True)], **kwargs)
    except (TypeError, ValueError) as error:
        given = f" with --optim_args {args.optim_args}" if args.optim_args else ""
        raise ValueError(f"--optim {OptimizerNames(args.optim).value}{given} is invalid: {error}.") from error
