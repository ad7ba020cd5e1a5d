"""Flags that transformers has, or had, and that cannot act in this trainer: tables, and `refuse_unsupported_flags`
for `arguments.py`.

Every other flag of transformers acts as documented there, or only together with one that is refused here.
"""

from dataclasses import fields

import transformers

NO_EVALUATION = "there is no evaluation data"
NO_DATALOADER = "the dataloader reads a plan that every rank computes for itself"

# flag -> why it keeps its default value
UNSUPPORTED = {
    "accelerator_config": NO_DATALOADER,
    "auto_find_batch_size": "the plan of an epoch needs --per_device_train_batch_size before the first step",
    "average_tokens_across_devices": "every micro-batch counts alike, as in upstream",
    "dataloader_drop_last": "the last step of an epoch may be smaller and is weighed as such",
    "dataloader_in_order": NO_DATALOADER,
    "ddp_backend": "the process group is there before flags are read: nccl with CUDA, gloo without",
    "do_eval": NO_EVALUATION,
    "do_predict": NO_EVALUATION,
    "eval_on_start": NO_EVALUATION,
    "eval_strategy": NO_EVALUATION,
    "fsdp": "weights are sharded by --deepspeed zero_stage3_config.json",
    "fsdp_config": "weights are sharded by --deepspeed zero_stage3_config.json",
    "ignore_data_skip": "going on in the middle of an epoch costs nothing here",
    "include_num_input_tokens_seen": "the log has tokens_per_second and tiles_per_second",
    "label_smoothing_factor": "the loss is the cross entropy over trained tokens",
    "length_column_name": "--group_by_length measures samples itself",
    "liger_kernel_config": "say --use_liger True",
    "load_best_model_at_end": NO_EVALUATION,
    "optim_target_modules": "optimizers that rewrite the model are not supported",
    "parallelism_config": "ranks share data only; weights are sharded by --deepspeed",
    "torch_compile": "--compile True compiles layer by layer, for rows of any length",
    "torch_compile_backend": "--compile True compiles layer by layer, for rows of any length",
    "torch_compile_mode": "--compile True compiles layer by layer, for rows of any length",
    "train_sampling_strategy": "say --group_by_length True",
    "use_cache": "training keeps no cache of keys and values",
    "use_liger_kernel": "say --use_liger True",
}

# flag -> the values that act, and why no other does
SUPPORTED_VALUES = {
    "optim": (
        ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
        "it must take a group of parameters for each part",
    ),
    "save_strategy": (("no", "steps", "epoch"), NO_EVALUATION),
}

# flag that transformers 5 dropped -> what stands in its place
REMOVED_FLAGS = {
    "adafactor": "say --optim adafactor",
    "include_tokens_per_second": "the log has tokens_per_second anyway",
    "logging_dir": "TENSORBOARD_LOGGING_DIR in the environment names the folder of TensorBoard's files",
    "no_cuda": "say --use_cpu True",
    "per_gpu_train_batch_size": "say --per_device_train_batch_size",
    "push_to_hub_model_id": "say --hub_model_id",
    "push_to_hub_token": "say --hub_token",
    "save_safetensors": "weights are always saved as safetensors",
    "torchdynamo": "--compile True compiles layer by layer, for rows of any length",
}


def refuse_unsupported_flags(args: transformers.TrainingArguments) -> None:
    """Raises a ValueError for the first flag whose value cannot act: one sentence."""
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in UNSUPPORTED.items():
        value, default = getattr(args, name), defaults[name]
        if value != default and (value or default is True):  # for some the parser spells the default None or False
            raise ValueError(f"--{name} {value} cannot act here: {reason}.")
    for name, (values, reason) in SUPPORTED_VALUES.items():
        if (value := getattr(args, name)) not in values:
            raise ValueError(f"--{name} {value} cannot act here: {reason}; known are {', '.join(values)}.")
    adamw = args.optim in ("adamw_torch", "adamw_torch_fused")
    if args.deepspeed and not adamw:
        raise ValueError(f"--optim {args.optim} cannot act together with --deepspeed, whose optimizer is AdamW.")
    if args.optim_args and adamw:
        raise ValueError(f"--optim_args {args.optim_args} cannot act: AdamW takes --adam_beta1, --adam_beta2, ...")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout"):
        if (value := getattr(args, name)) < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"--max_steps {args.max_steps} --num_train_epochs {args.num_train_epochs} leave nothing to train."
        )
