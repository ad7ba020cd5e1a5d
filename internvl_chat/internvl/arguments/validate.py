"""Validate flags against each other and the environment, before anything is loaded.

Single training flags are validated earlier, in the `__post_init__` of their dataclass.
"""

import json
import logging
import os
import re
import shutil
import tempfile

from PIL import ImageColor

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.deepspeed_config import OFFLOAD_KEYS, get_zero_stage
from internvl.arguments.flags import require
from internvl.arguments.model import ModelArguments
from internvl.arguments.per_part import PART_NAMES, LoraArguments, get_part_settings
from internvl.arguments.preference import DPOConfig, PreferenceDataArguments
from internvl.arguments.training import TrainingArguments
from internvl.constants import MAX_FRAMES_PER_VIDEO, MAX_TILES_PER_IMAGE
from internvl.conversation import conv_templates

logger = logging.getLogger(__name__)

LAYER_RANGE = re.compile(r"(-?\d+)?:(-?\d+)?")

# A DataLoader worker sends tensors through a socket in TMPDIR. Linux limits the path of a socket (unix(7)). With a
# longer path the tensors never arrive.
WORKER_SOCKET = "/pymp-12345678/listener-12345678"
MAX_SOCKET_PATH_BYTES = 107


def validate_arguments(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> None:
    """Raise a ValueError if the flags or the environment are invalid."""
    validate_model_source(model_args)
    validate_data_arguments(data_args)
    validate_lora_arguments(model_args)
    require(model_args, "drop_path_rate", 0 <= model_args.drop_path_rate < 1, "a probability in [0, 1)")
    validate_gradient_checkpointing(model_args, training_args)
    validate_compile(model_args, training_args)
    validate_worker_socket(training_args)
    validate_op_compilation(training_args)


def validate_preference_arguments(
    model_args: ModelArguments, data_args: PreferenceDataArguments, args: DPOConfig
) -> None:
    """Raise a ValueError if the flags of a preference run are invalid."""
    validate_arguments(model_args, data_args, args)
    for name, value in {"use_packed_ds": False, "loss_reduction": "token", "loss_reduction_all_gather": False}.items():
        if getattr(data_args, name) != value:
            raise ValueError(f"--{name} {getattr(data_args, name)} is not supported with preference data: remove it.")
    if args.eval_base_answers:
        raise ValueError(
            f"--eval_base_answers {args.eval_base_answers!s:.80} is not supported with preference data: remove it."
        )
    for name in {"sigmoid", "bco_pair"} - set(args.loss_type.split(",")):
        if (weight := getattr(data_args, f"{name}_loss_weight")) != 1:
            raise ValueError(
                f"--{name}_loss_weight {weight} is not supported with --loss_type {args.loss_type}: it has no effect "
                "there."
            )


def validate_model_source(args: ModelArguments) -> None:
    """Require a chat checkpoint, or a vision encoder and an LLM."""
    parts = {"--vision_path": args.vision_path, "--llm_path": args.llm_path}
    given = [flag for flag, path in parts.items() if path]
    if args.model_name_or_path and given:
        logger.warning("%s ignored: --model_name_or_path takes precedence", " and ".join(given))
    elif not args.model_name_or_path and not given:
        raise ValueError(
            "--model_name_or_path is required: the chat checkpoint to start from. Or compose one: set "
            "--vision_path and --llm_path."
        )
    elif not args.model_name_or_path and len(given) == 1:
        (absent,) = parts.keys() - given
        raise ValueError(f"{absent} is required with {given[0]}: a chat model is composed of both.")


def validate_data_arguments(args: DataTrainingArguments) -> None:
    """Raise a ValueError if a flag on samples or packing is invalid."""
    if not args.meta_path:
        raise ValueError("--meta_path is required: the JSON file that lists the datasets.")
    require(args, "conv_style", args.conv_style in conv_templates, f"one of {', '.join(conv_templates)}")
    for flag in ("num_images_expected", "max_packed_tokens"):
        require(args, flag, getattr(args, flag) >= 1, "an integer >= 1")
    for low, high in (("min_dynamic_patch", "max_dynamic_patch"), ("min_num_frame", "max_num_frame")):
        require(args, low, getattr(args, low) >= 1, "an integer >= 1")
        require(args, high, getattr(args, high) >= getattr(args, low), f"at least --{low} {getattr(args, low)}")
    for flag, limit in (("max_dynamic_patch", MAX_TILES_PER_IMAGE), ("max_num_frame", MAX_FRAMES_PER_VIDEO)):
        require(args, flag, getattr(args, flag) <= limit, f"at most {limit:,}")
    require(args, "image_background", _is_color(args.image_background), "a CSS color name or #rrggbb")
    ratio = args.down_sample_ratio
    is_valid = 0 < ratio <= 1 and 1 / ratio == round(1 / ratio)
    require(args, "down_sample_ratio", is_valid, "1 / n, where an image token covers n x n patches")


def _is_color(text: str) -> bool:
    try:
        return bool(ImageColor.getrgb(text))
    except ValueError:
        return False


def validate_lora_arguments(args: ModelArguments) -> None:
    """Raise a ValueError if a LoRA rank or setting is invalid."""
    for part_flag in PART_NAMES:
        rank_flag = f"use_{part_flag}_lora"
        rank = getattr(args, rank_flag)
        settings = get_part_settings(args, LoraArguments, part_flag)
        for setting, value in settings.items():
            if not rank:
                raise ValueError(f"--{part_flag}_{setting} {value} requires --{rank_flag}: there are no adapters.")
        if "lora_layers" in settings:
            is_valid = bool(LAYER_RANGE.fullmatch(settings["lora_layers"]))
            require(args, f"{part_flag}_lora_layers", is_valid, "START:STOP, such as 0:12 or -8:")
    if args.train_new_tokens and not args.use_llm_lora:
        raise ValueError(
            "--train_new_tokens True requires --use_llm_lora: without LoRA in the LLM its embeddings are trained or "
            "frozen as a whole."
        )


def validate_gradient_checkpointing(args: ModelArguments, training_args: TrainingArguments) -> None:
    """Raise a ValueError if gradient checkpointing flags are invalid or contradictory."""
    ratio, keep = args.grad_checkpoint_ratio, args.grad_checkpoint_keep
    require(args, "grad_checkpoint_ratio", 0 < ratio <= 1, "a share of the layers in (0, 1]")
    flags = [] if ratio == 1 else [f"--grad_checkpoint_ratio {ratio:g}"]
    flags += [] if keep == "none" else [f"--grad_checkpoint_keep {keep}"]
    if flags and not (args.grad_checkpoint or args.vit_grad_checkpoint):
        raise ValueError(
            f"{' '.join(flags)} is not supported with --grad_checkpoint False: it has no effect there. Remove "
            "it, or add --grad_checkpoint_ratio 1 if a recipe sets another."
        )
    if args.vit_grad_checkpoint is False:
        flags.append("--vit_grad_checkpoint False")
    # Since transformers 5.23 an alias, which has the value of `activation_checkpointing`.
    if training_args.gradient_checkpointing and flags:
        raise ValueError(
            f"{' '.join(flags)} is not supported with --gradient_checkpointing True, which recomputes all layers of "
            "the vision encoder and the LLM: use --grad_checkpoint True instead."
        )
    kwargs = training_args.gradient_checkpointing_kwargs or {}
    if (json.loads(kwargs) if isinstance(kwargs, str) else kwargs).get("use_reentrant"):
        raise ValueError(
            f"--gradient_checkpointing_kwargs {kwargs} is not supported: reentrant checkpoints lose gradients of "
            "adapters."
        )


def validate_compile(args: ModelArguments, training_args: TrainingArguments) -> None:
    """Raise a ValueError for flags that --compile True does not support."""
    if not args.compile:
        return
    if args.grad_checkpoint_keep != "none":
        raise ValueError(
            f"--compile True is not supported with --grad_checkpoint_keep {args.grad_checkpoint_keep}: the outputs "
            "of attention and linear layers cannot be identified in a compiled layer. Use --grad_checkpoint_ratio."
        )
    if args.drop_path_rate:
        raise ValueError(
            f"--compile True is not supported with --drop_path_rate {args.drop_path_rate}: every vision encoder layer "
            "has another drop rate and would be compiled separately."
        )
    if get_zero_stage(training_args.deepspeed) == 3:
        raise ValueError(
            "--compile True is not supported under ZeRO-3: DeepSpeed gathers weights before every linear layer, which "
            "breaks the graph each time and leaves nothing to gain. Use ZeRO-2, or remove the flag."
        )


def validate_worker_socket(args: TrainingArguments) -> None:
    """Raise a ValueError if TMPDIR is too long for sockets of workers."""
    folder = tempfile.gettempdir()
    excess = len(os.fsencode(folder + WORKER_SOCKET)) - MAX_SOCKET_PATH_BYTES
    if args.dataloader_num_workers and excess > 0:
        raise ValueError(
            f"TMPDIR {folder} is {excess} bytes too long for the sockets of --dataloader_num_workers "
            f"{args.dataloader_num_workers}: set TMPDIR to a shorter folder, such as /tmp."
        )


def validate_op_compilation(args: TrainingArguments) -> None:
    """Raise a ValueError if DeepSpeed cannot compile the ops that a run needs."""
    if not isinstance(args.deepspeed, dict) or not list_ops_to_compile(args.deepspeed):
        return
    compiler = os.environ.get("CXX") or "c++"
    if not shutil.which(compiler.split()[0]):
        raise ValueError(
            f"DeepSpeed compiles an op, and the C++ compiler {compiler} is missing: set CXX, or apt-get install g++."
        )
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"DeepSpeed compiles an op into {folder}, which cannot be created ({error.strerror}): set HOME or "
            "TORCH_EXTENSIONS_DIR to a writable folder."
        ) from error


def list_ops_to_compile(config: dict) -> list[str]:
    """List the ops that DeepSpeed compiles for a run.

    They are those that the run needs and that were not built into DeepSpeed. Ranks on CPUs add through shared memory,
    and an optimizer with offloaded states runs on the CPU. Otherwise a GPU needs none.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    offloads = [config["zero_optimization"].get(key) or {} for key in OFFLOAD_KEYS]
    devices = [offload.get("device") for offload in offloads]
    builders = ["ShareMemCommBuilder"]  # GPUs have none
    if devices[0] in ("cpu", "nvme"):
        builders.append("CPUAdamBuilder")
    if "nvme" in devices:
        builders.append("AsyncIOBuilder")
    ops = [op.name for op in map(get_accelerator().create_op_builder, builders) if op]
    return [name for name in ops if not installed_ops.get(name)]
