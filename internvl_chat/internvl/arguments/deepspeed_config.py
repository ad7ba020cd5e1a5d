"""Read the DeepSpeed configuration file of a run, and check it against the flags."""

import contextlib
import copy
import importlib.util
import io
import json
import os
from importlib.resources import files
from pathlib import Path

import transformers

from internvl.arguments.optimizers import ADAMW
from internvl.dist_utils import get_world_size
from internvl.versions import require_package

ZERO_CONFIG_DIR = files("internvl") / "zero_stage_configs"
if not ZERO_CONFIG_DIR.is_dir():  # in an upstream checkout the files are next to the package
    ZERO_CONFIG_DIR = Path(__file__).parents[2]
MAX_CONFIG_BYTES = 2**20  # the shipped files have 1 kB

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# expected value -> its types, keys of the configuration
SUPPORTED_KEYS = {
    "a JSON object": (
        (dict,),
        "zero_optimization optimizer bf16 fp16 data_types aio checkpoint activation_checkpointing "
        "comms_logger tensorboard wandb comet csv_monitor",
    ),
    "true or false": (
        (bool,),
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients sparse_gradients "
        "disable_allgather wall_clock_breakdown memory_breakdown dump_state",
    ),
    'a number or "auto"': ((int, float, str), f"{' '.join(BATCH_KEYS)} gradient_clipping"),
    "a number": ((int, float), "gradient_predivide_factor steps_per_print"),
    "a data type or null": ((str, type(None)), "communication_data_type"),
}
# key -> reason, or what to use; blocks with "enabled": false are dropped
UNSUPPORTED_KEYS = {
    "amp": "use --bf16 True",
    "scheduler": "use --lr_scheduler_type, which keeps a learning rate per part",
    "compile": "use --compile True",
    "torch_autocast": "use --bf16 True --lora_fp32 True",
    "flops_profiler": "the log has tflops and mfu_percent",
    "elasticity": "the flags set the batch size",
    "curriculum_learning": "the epoch plan decides which sample is in which step",
    "data_efficiency": "the epoch plan decides which sample is in which step",
    **dict.fromkeys(("tensor_parallel", "sequence_parallel_size", "pipeline"), "training is data-parallel"),
}
# class of DeepSpeed that checks a block -> block
CHECKED_BLOCKS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedFP16Config": "fp16",
    "DeepSpeedBF16Config": "bf16",
}
MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
OFFLOAD_KEYS = ("offload_optimizer", "offload_param")


def load_deepspeed_config(source: str | dict, args: transformers.TrainingArguments) -> dict:
    """Load a DeepSpeed configuration, given by path, bare name or content.

    A bare name is a file in `zero_stage_configs/`. Values that the flags decide are "auto" in the result. The AdamW
    block is removed: the trainer builds the same AdamW, with a learning rate per part, from the flags that the block's
    `auto` values refer to. `wall_clock_breakdown` is kept with --log_level debug only, because it prints and
    synchronizes the device in every micro-batch.

    Raises:
        ValueError: no such file, or a key or value that is invalid, not supported, or contradicts the flags.
    """
    require_package("deepspeed", "--deepspeed")
    label, config = read_deepspeed_config(source)
    config = {key: value for key, value in config.items() if not is_disabled_block(key, value)}
    check_keys(label, config)
    check_zero_block(label, config.setdefault("zero_optimization", {"stage": 0}))
    for block, package in MONITOR_PACKAGES.items():
        if config.get(block, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ValueError(f"{label}: {block} requires the package {package}: install it, or remove the block.")
    check_optimizer_block(label, config.pop("optimizer", {"type": "AdamW"}), args)
    if args.optim not in ADAMW:  # else accelerate would put DeepSpeed's CPU Adam in place of an offloaded optimizer
        config["zero_force_ds_cpu_optimizer"] = False
    defer_to_flags(label, config, args)
    config["wall_clock_breakdown"] = config.get("wall_clock_breakdown", False) and args.log_level == "debug"
    try_config(label, config)
    if args.fp16 and not is_fp16_supported():
        raise ValueError("--fp16 True is not supported with --deepspeed on this device: use --bf16 True.")
    return config


def read_deepspeed_config(source: str | dict) -> tuple[str, dict]:
    """Read a configuration.

    Args:
        source: path, bare name, JSON text in braces, or an object of a JSON file of arguments.

    Returns:
        How error messages refer to it, and its content.
    """
    if isinstance(source, dict):
        return "--deepspeed", source
    if source.lstrip().startswith("{"):
        return "--deepspeed", parse_config("--deepspeed", source)
    shipped = {file.name: file for file in ZERO_CONFIG_DIR.iterdir() if file.name.endswith(".json")}
    is_path = os.path.isfile(source)  # False for a FIFO or device, which would block
    file = Path(source) if is_path else shipped.get(source)
    if file is None:
        known = ", ".join(sorted(shipped))
        raise ValueError(f"--deepspeed {source:.200}: no such file; expected a path, or one of {known}.")
    label = f"--deepspeed {file}"
    if is_path and (size := os.path.getsize(source)) > MAX_CONFIG_BYTES:
        raise ValueError(f"{label} is invalid: expected at most {MAX_CONFIG_BYTES:,} bytes, got {size:,}.")
    try:
        return label, parse_config(label, file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{label} cannot be read: {error}.") from error


def parse_config(label: str, text: str) -> dict:
    """Parse the JSON of a configuration."""

    def build_object(pairs: list[tuple]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} occurs twice")
        return found

    def refuse_constant(name: str):
        raise ValueError(f"{name} is not a number")

    try:
        config = json.loads(text, object_pairs_hook=build_object, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError(f"{label} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{label} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{label} is invalid: expected a JSON object, got {config!r:.80}.")
    return config


def is_disabled_block(key: str, value) -> bool:
    """Check for a block that would not be supported if it were enabled."""
    return key in UNSUPPORTED_KEYS and isinstance(value, dict) and value.get("enabled") is False


def check_keys(label: str, config: dict) -> None:
    """Check that keys are supported and their values have the right type."""
    expected = {key: (words, types) for words, (types, keys) in SUPPORTED_KEYS.items() for key in keys.split()}
    for key, value in config.items():
        if key in UNSUPPORTED_KEYS:
            raise ValueError(f"{label}: {key} is not supported: {UNSUPPORTED_KEYS[key]}.")
        if key not in expected:
            raise ValueError(f"{label}: {key!r:.80} is not supported: expected keys among {', '.join(expected)}.")
        words, types = expected[key]
        if not isinstance(value, types):
            raise ValueError(f"{label}: {key} {value!r:.80} is invalid: expected {words}.")


def check_zero_block(label: str, zero: dict) -> None:
    """Raise a ValueError for an invalid stage, or an offload without its requirements."""
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise ValueError(f"{label}: zero_optimization.stage {stage!r:.80} is invalid: expected 0, 1, 2 or 3.")
    for key in OFFLOAD_KEYS:
        offload = zero.get(key) or {}
        device = offload.get("device") if isinstance(offload, dict) else None
        if device in (None, "none"):
            continue
        minimum_stage = 3 if key == "offload_param" or device == "nvme" else 1
        if stage < minimum_stage:
            raise ValueError(
                f"{label}: zero_optimization.{key} to {device!s:.80} requires stage >= {minimum_stage}, got {stage}."
            )
        if device == "nvme":
            check_nvme(f"{label}: zero_optimization.{key}", offload)


def check_nvme(label: str, offload: dict) -> None:
    """Raise a ValueError unless states can be offloaded to a folder."""
    path = offload.get("nvme_path")
    if not isinstance(path, str) or not os.path.isdir(path):
        raise ValueError(f"{label}.nvme_path {path!r:.200} is invalid: expected a folder.")
    from deepspeed.accelerator import get_accelerator

    with contextlib.redirect_stdout(io.StringIO()):  # it prints why
        is_compatible = get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)
    if not is_compatible:
        raise ValueError(f"{label} to nvme requires the library libaio (package libaio-dev).")


def check_optimizer_block(label: str, optimizer: dict, args: transformers.TrainingArguments) -> None:
    """Check that the optimizer of the file is AdamW with the flags' values.

    With another --optim the block has no effect: every shipped file has one.
    """
    if optimizer.get("type") != "AdamW":
        raise ValueError(f"{label}: optimizer {optimizer.get('type')!s:.80} is not supported: expected AdamW.")
    params = optimizer.get("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"{label} is invalid: expected optimizer params as a JSON object, got {params!r:.80}.")
    flags = {
        "lr": args.learning_rate,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        # DeepSpeed's own settings of AdamW
        "torch_adam": True,
        "adam_w_mode": True,
        "bias_correction": True,
        "amsgrad": False,
    }
    for key, value in params.items() if args.optim in ADAMW else ():
        if key not in flags:
            raise ValueError(f"{label}: optimizer {key!r:.80} is not supported: expected {', '.join(flags)}.")
        if value != "auto" and value != flags[key]:
            raise ValueError(
                f"{label}: optimizer {key} {value!s:.80} contradicts the command line, which has {flags[key]}."
            )


def defer_to_flags(label: str, config: dict, args: transformers.TrainingArguments) -> None:
    """Set what the flags decide to "auto".

    Raises:
        ValueError: the file has another value.
    """
    micro_batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    ranks = get_world_size()
    batch = (
        f"--per_device_train_batch_size {micro_batch} x --gradient_accumulation_steps {accumulation} x {ranks} ranks"
    )
    # block, key -> value by the flags, the flags
    decided = {
        (None, "train_micro_batch_size_per_gpu"): (micro_batch, f"--per_device_train_batch_size {micro_batch}"),
        (None, "gradient_accumulation_steps"): (accumulation, f"--gradient_accumulation_steps {accumulation}"),
        (None, "train_batch_size"): (micro_batch * accumulation * ranks, batch),
        (None, "gradient_clipping"): (args.max_grad_norm, f"--max_grad_norm {args.max_grad_norm}"),
        ("bf16", "enabled"): (args.bf16, f"--bf16 {args.bf16}"),
        ("fp16", "enabled"): (args.fp16, f"--fp16 {args.fp16}"),
    }
    for (block, key), (expected, flags) in decided.items():
        values = config.setdefault(block, {}) if block else config
        value = values.setdefault(key, "auto")
        is_same_type = isinstance(value, bool) == isinstance(expected, bool)
        if value != "auto" and not (is_same_type and value == expected):
            name = f"{block}.{key}" if block else key
            shown = json.dumps(value)
            raise ValueError(f'{label}: {name} {shown:.80} contradicts {flags}: set it to "auto".')
        values[key] = "auto"


def try_config(label: str, config: dict) -> None:
    """Let DeepSpeed check the configuration, before a model is loaded.

    Raises:
        ValueError: DeepSpeed does not accept a key or value.
    """
    from pydantic import ValidationError

    # Values that the flags decide are still "auto".
    numbers = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    switches = {block: {**config[block], "enabled": False} for block in ("bf16", "fp16")}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its defaults, and warnings
            from deepspeed.runtime.config import DeepSpeedConfig

            # DeepSpeed computes `train_batch_size` from the others and the number of ranks.
            tried = {key: value for key, value in config.items() if key != "train_batch_size"}
            DeepSpeedConfig(copy.deepcopy({**tried, **numbers, **switches}))
    except ValidationError as error:
        first = error.errors()[0]
        blocks = [CHECKED_BLOCKS[error.title]] if error.title in CHECKED_BLOCKS else []
        key = ".".join(map(str, [*blocks, *first["loc"]]))
        raise ValueError(f"{label}: {key} {first['input']!r:.80} is invalid: {first['msg']}.") from error
    except Exception as error:  # of any type: DeepSpeed reads most blocks without checking them
        raise ValueError(f"{label} is invalid: {' '.join(str(error).split()):.300}.") from error


def limit_reduce_bucket(config: dict, num_elements: int) -> None:
    """Let the bucket of gradients hold no more than all gradients of a rank.

    DeepSpeed allocates the whole bucket, with `overlap_comm` two of them: 4 GB for the 1e9 elements of a file that is
    made for full fine-tuning, while the adapters of an 8B model have 4e7.

    Args:
        num_elements: of all trainable parameters.
    """
    zero = config["zero_optimization"]
    size = zero.get("reduce_bucket_size", 5e8)  # DeepSpeed's default
    if size != "auto":  # transformers chooses the square of the hidden size
        zero["reduce_bucket_size"] = min(int(size), num_elements)


def is_fp16_supported() -> bool:
    """Check whether DeepSpeed supports fp16 on this device."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().is_fp16_supported()


def get_zero_stage(deepspeed_config: dict | str | None) -> int:
    """Return the ZeRO stage of a loaded configuration, 0 without one."""
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0) if isinstance(deepspeed_config, dict) else 0
