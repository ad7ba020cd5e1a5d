"""Flags of transformers that this trainer does not support, and why.

All other flags of transformers work as documented there, or only have an effect together with a flag listed here.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

OWN_EVALUATION = "evaluation sets are packed, and run in the precision of training"
OWN_DATALOADER = "the data loader reads an epoch plan that every rank computes for itself"
SHARDED_BY_DEEPSPEED = "weights are sharded by --deepspeed zero_stage3_config.json"
OWN_COMPILE = "use --compile True, which compiles layer by layer, for rows of any length"

# flag -> reason why only its default value is supported
UNSUPPORTED = {
    "accelerator_config": OWN_DATALOADER,
    "auto_find_batch_size": "the epoch plan needs --per_device_train_batch_size before the first step",
    "batch_eval_metrics": OWN_EVALUATION,
    "bf16_full_eval": OWN_EVALUATION,
    "average_tokens_across_devices": "all micro-batches have the same weight, as in upstream; see "
    "--loss_reduction_all_gather",
    "dataloader_drop_last": "the last step of an epoch may be smaller, and its loss is weighted accordingly",
    "dataloader_in_order": OWN_DATALOADER,
    "ddp_backend": "the process group is created before flags are parsed: nccl with CUDA, else gloo",
    "do_predict": "`internvl chat` answers the questions of a file",
    "enable_jit_checkpoint": "it installs a second SIGTERM handler; SIGTERM already saves a checkpoint, within "
    "--save_on_signal_seconds",
    "eval_accumulation_steps": OWN_EVALUATION,
    "eval_do_concat_batches": OWN_EVALUATION,
    "eval_use_gather_object": OWN_EVALUATION,
    "fp16_full_eval": OWN_EVALUATION,
    "fsdp": SHARDED_BY_DEEPSPEED,
    "fsdp_config": SHARDED_BY_DEEPSPEED,
    "ignore_data_skip": "resuming in the middle of an epoch reads no sample twice and takes no time",
    "include_for_metrics": OWN_EVALUATION,
    "include_num_input_tokens_seen": "the log has tokens_per_second and tiles_per_second",
    "label_smoothing_factor": "the loss is the cross entropy of the loss tokens",
    "length_column_name": "--group_by_length True measures the samples itself",
    "liger_kernel_config": "use --use_liger True",
    "optim_target_modules": "optimizers that rewrite the model are not supported",
    "parallelism_config": "training is data-parallel; --deepspeed shards the weights",
    "prediction_loss_only": "use --eval_num_samples 0, which measures only losses",
    "torch_compile": OWN_COMPILE,
    "torch_compile_backend": OWN_COMPILE,
    "torch_compile_mode": OWN_COMPILE,
    "train_sampling_strategy": "use --group_by_length True",
    "use_cache": "training has no KV cache",
    "use_liger_kernel": "use --use_liger True",
}

# flag that transformers 5 removed -> replacement
REMOVED_FLAGS = {
    "adafactor": "use --optim adafactor",
    "include_tokens_per_second": "the log always has tokens_per_second",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR to the folder for TensorBoard's files",
    "no_cuda": "use --use_cpu True",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_token": "use --hub_token",
    "save_safetensors": "weights are always saved as safetensors",
    "torchdynamo": OWN_COMPILE,
}


def refuse_unsupported_flags(args: "transformers.TrainingArguments") -> None:
    """Raise a ValueError for the first flag whose value is not supported."""
    defaults = {field.name: field.default for field in fields(args)}
    for flag, reason in UNSUPPORTED.items():
        if flag not in defaults:  # of a newer transformers, such as `dataloader_in_order` of 5.17
            continue
        value, default = getattr(args, flag), defaults[flag]
        # transformers' parser may replace None by False or the reverse: every falsy value counts as the default, unless
        # the default is True.
        if value != default and (value or default is True):
            raise ValueError(f"--{flag} {value} is not supported: {reason}.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"--max_steps {args.max_steps} with --num_train_epochs {args.num_train_epochs} is invalid: there are no "
            "steps to train; expected one of them > 0."
        )
