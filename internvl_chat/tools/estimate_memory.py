"""Estimate the GPU memory of a training, on any machine without a GPU.

    internvl plan internvl2.5/8b_vit_lora --gpus 8 [flags of the training]
    internvl plan --gpus 8 --model_name_or_path MODEL --use_llm_lora 16 [flags of the training]

The flags are those of the recipe (which DRY_RUN=1 prints), then those given here. MODEL is a checkpoint folder, of
which only `config.json` is read, or the hub name of a published InternVL2.5, whose shapes are built in. The model runs
a forward and a backward pass on tensors without data; `internvl/planning/memory_estimate.py` says what is not
contained. The micro-batch is the largest one: rows are full, of image tokens as far as the limits allow. Each line of
the table adds its flags to the others.
"""

import argparse
import copy
import os
import shlex
import subprocess
import sys

import torch
from torch import nn

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.deepspeed_config import get_zero_stage
from internvl.arguments.model import ModelArguments
from internvl.arguments.training import FINETUNE_ARGUMENTS, TrainingArguments, parse_args
from internvl.arguments.validate import (
    validate_data_arguments,
    validate_gradient_checkpointing,
    validate_lora_arguments,
)
from internvl.command_line import exit_on_user_error, log_to_console
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.internvl_chat.resize import check_image_size
from internvl.model.lora import PART_FLAGS
from internvl.planning.memory_estimate import GIB, MemoryEstimate, Row, estimate_memory, trace_step
from internvl.recipes import find_recipe
from internvl.tools.benchmark.sizes import INTERNLM_1_8B, INTERNLM_7B, QWEN_05B, VIT_300M, set_default_dtype
from internvl.train.build_model import get_model_dtype, load_config, prepare_for_training, set_kernels
from internvl.train.quantization import is_quantized
from internvl.train.trainable_parameters import set_trainable

MAX_GPUS = 65_536
GPU_GIB = {"80 GB": 79.0, "40 GB": 39.4, "24 GB": 22.4}  # what such GPUs have at least (H100, A100, A10)
MAX_SHARE = 0.9  # of a GPU's memory; the rest is for fragmentation and what is not estimated
MIN_TEXT_TOKENS = 128  # of a row that is full of images
# Part of an optimizer's name -> moments per parameter. Adafactor's are factored, a row and a column per matrix; SGD is
# without momentum.
NUM_MOMENTS = {"ademamix": 3, "adamw": 2, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "sgd": 0}
# Lines of the table after the first -> flags that they add; `{half}` is half of --max_packed_tokens.
VARIANTS = {
    "recompute all layers": "--grad_checkpoint True --grad_checkpoint_ratio 1",
    "recompute 4 of 5": "--grad_checkpoint True --grad_checkpoint_ratio 0.8",
    "recompute every 2nd": "--grad_checkpoint True --grad_checkpoint_ratio 0.5",
    "recompute none": "--grad_checkpoint False --grad_checkpoint_ratio 1",
    "all, half the tokens": "--grad_checkpoint True --grad_checkpoint_ratio 1 --max_packed_tokens {half}",
    "all, QLoRA": "--grad_checkpoint True --grad_checkpoint_ratio 1 --quantize_llm True",
    "all, half, QLoRA": (
        "--grad_checkpoint True --grad_checkpoint_ratio 1 --max_packed_tokens {half} --quantize_llm True"
    ),
}

VIT_6B = VIT_300M | {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "qkv_bias": False,
}


def _scale(llm: dict, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict:
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return llm | shape | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}


# Vision encoder and LLM of the published models. None ties its LM head.
PUBLISHED_SHAPES = {
    "OpenGVLab/InternVL2_5-1B": (VIT_300M, QWEN_05B),
    "OpenGVLab/InternVL2_5-2B": (VIT_300M, INTERNLM_1_8B),
    "OpenGVLab/InternVL2_5-4B": (VIT_300M, _scale(QWEN_05B, 2048, 11008, 36, 16, 2)),
    "OpenGVLab/InternVL2_5-8B": (VIT_300M, INTERNLM_7B),
    "OpenGVLab/InternVL2_5-26B": (VIT_6B, _scale(INTERNLM_1_8B, 6144, 16384, 48, 48, 8)),
    "OpenGVLab/InternVL2_5-38B": (VIT_6B, _scale(QWEN_05B, 5120, 27648, 64, 40, 8)),
    "OpenGVLab/InternVL2_5-78B": (VIT_6B, _scale(QWEN_05B, 8192, 29568, 80, 64, 8)),
}
Arguments = tuple[ModelArguments, DataTrainingArguments, TrainingArguments]


@exit_on_user_error
def main(argv=None):
    args, flags = parse_tool_args(argv)
    log_to_console()
    if args.recipe:
        flags = read_recipe_flags(args.recipe, args.gpus, flags)
    parsed = parse_training_flags(flags)
    validate_flags(*parsed)
    data_args = parsed[1]
    lines = {"these flags": flags}
    for label, words in VARIANTS.items() if not args.only_these_flags else ():
        lines[label] = [*flags, *words.format(half=data_args.max_packed_tokens // 2).split()]
    estimates = {}
    for label, words in lines.items():
        variant = parse_training_flags(words)
        if is_supported(variant):
            estimates[label] = estimate(variant, args.gpus)
    print(format_settings(parsed, args.gpus))
    print(format_table(estimates))


def parse_tool_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of this tool; return the flags of training as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs, which share what ZeRO divides (default: 1)"
    )
    parser.add_argument("--only_these_flags", action="store_true", help="print the first line of the table only")
    argv = sys.argv[1:] if argv is None else argv
    recipe = argv[0] if argv and not argv[0].startswith("-") else None
    args, flags = parser.parse_known_args(argv[1:] if recipe else argv)
    args.recipe = recipe
    if not 1 <= args.gpus <= MAX_GPUS:
        raise ValueError(f"--gpus {args.gpus} is invalid: expected an integer from 1 to {MAX_GPUS:,}.")
    return args, flags


def read_recipe_flags(recipe: str, num_gpus: int, flags: list[str]) -> list[str]:
    """Return the flags that a recipe passes to its program.

    Raises:
        ValueError: the recipe fails, or trains on preference pairs, whose memory is not estimated.
    """
    variables = {"DRY_RUN": "1", "GPUS": str(num_gpus), "NODES": "1", "CUDA_VISIBLE_DEVICES": "", "LAUNCHER": "pytorch"}
    command = ["bash", str(find_recipe(recipe)), *flags]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the recipe {recipe!r:.200} failed: {done.stderr.strip()[-300:]}")
    words = shlex.split(done.stdout)
    program = next((i for i, word in enumerate(words) if word.endswith(("_finetune.py", "_pretrain.py"))), None)
    if program is None:
        raise ValueError(f"the recipe {recipe!r:.200} is not supported: expected one of supervised fine-tuning.")
    return words[program + 1 :]


def parse_training_flags(flags: list[str]) -> Arguments:
    return parse_args(["--output_dir", "unused", "--meta_path", "unused", *flags], FINETUNE_ARGUMENTS)


def validate_flags(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> None:
    """Raise a ValueError if training would refuse the flags.

    Not checked is what depends on this machine.
    """
    validate_data_arguments(data_args)
    validate_lora_arguments(model_args)
    validate_gradient_checkpointing(model_args, training_args)
    if not is_supported((model_args, data_args, training_args)):
        raise ValueError(
            "--quantize_llm True requires --use_llm_lora, and --deepspeed without ZeRO-3, which cannot divide 4-bit "
            "weights."
        )


def is_supported(parsed: Arguments) -> bool:
    """Return whether training accepts the flags of a line: QLoRA needs adapters and no ZeRO-3."""
    model_args, _, training_args = parsed
    is_zero3 = get_zero_stage(training_args.deepspeed) == 3
    return not model_args.quantize_llm or bool(model_args.use_llm_lora and not is_zero3)


def complete_zero_block(args: TrainingArguments, model: InternVLChatModel) -> dict | None:
    """Return `zero_optimization` as training completes it; None without DeepSpeed."""
    if not args.deepspeed:
        return None
    args.hf_deepspeed_config.trainer_config_finalize(args, model, num_training_steps=1)  # fills "auto"
    return args.hf_deepspeed_config.config["zero_optimization"]


def estimate(parsed: Arguments, num_gpus: int) -> MemoryEstimate:
    """Estimate the memory of the largest micro-batch of these flags."""
    model_args, data_args, training_args = parsed
    model = build_model(*parsed)
    has_adapter_copies = training_args.deepspeed is None or training_args.lora_fp32
    autocast_dtype = get_model_dtype(training_args) if has_adapter_copies else None
    row = choose_row(model.config, data_args)
    num_rows = training_args.per_device_train_batch_size
    step = trace_step(model, row, num_rows, None if autocast_dtype == torch.float32 else autocast_dtype)
    return estimate_memory(
        model,
        step.peak,
        complete_zero_block(training_args, model),
        num_gpus,
        get_moment_bytes(training_args.optim),
        [part for part in PART_FLAGS if is_quantized(model_args, part)],
    )


def get_moment_bytes(optimizer: str) -> float:
    """Return the bytes of an optimizer's states per trainable parameter."""
    name = str(getattr(optimizer, "value", optimizer))  # an enum if parsed from the command line
    kind = next((kind for kind in NUM_MOMENTS if kind in name), "adamw")
    return NUM_MOMENTS[kind] * (1 if "8bit" in name else 4)


def build_model(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> InternVLChatModel:
    """Build the model of the training without weights, prepared as by `train.build_model`."""
    config = read_config(model_args, data_args)
    model_args = copy.copy(model_args)  # these flags need a GPU, or weights
    model_args.quantize_backbone = model_args.quantize_llm = model_args.compile = model_args.use_liger = False
    dtype = get_model_dtype(training_args)
    with torch.device("meta"), set_default_dtype(dtype):
        model = InternVLChatModel(config)
        model = set_kernels(model, model_args, data_args)
        model = set_trainable(model, model_args)
        if training_args.deepspeed and not training_args.lora_fp32:
            nn.Module.to(model, dtype)  # PEFT's adapters are fp32 until DeepSpeed casts them
        return prepare_for_training(model, model_args, training_args)


def read_config(model_args: ModelArguments, data_args: DataTrainingArguments) -> InternVLChatConfig:
    """Read the configuration of a checkpoint, or build that of a published model.

    Raises:
        ValueError: there is no chat checkpoint.
    """
    path = model_args.model_name_or_path
    if not path:
        raise ValueError("--model_name_or_path is required: a composed model is not supported.")
    if path in PUBLISHED_SHAPES:
        vision, llm = PUBLISHED_SHAPES[path]
        fields = {"template": "internvl2_5", "select_layer": model_args.vision_select_layer, "ps_version": "v2"}
        config = InternVLChatConfig(dict(vision), dict(llm), **fields)
    else:
        config = load_config(model_args, data_args)
    check_image_size(data_args.force_image_size, config.vision_config.patch_size, config.downsample_ratio)
    config.force_image_size = config.vision_config.image_size = data_args.force_image_size
    return config


def choose_row(config: InternVLChatConfig, args: DataTrainingArguments) -> Row:
    """Choose the row that needs most memory: full, with as many tiles as the limits allow."""
    tokens = args.max_packed_tokens if args.use_packed_ds else args.max_seq_length
    max_tiles = max(0, tokens - MIN_TEXT_TOKENS) // count_image_tokens(config)
    return Row(tokens, min(max_tiles, args.num_images_expected) if args.use_packed_ds else max_tiles)


def format_settings(parsed: Arguments, num_gpus: int) -> str:
    """Describe the model and the micro-batch."""
    model_args, data_args, training_args = parsed
    model = build_model(*parsed)
    row = choose_row(model.config, data_args)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    num_parameters = sum(p.numel() for p in model.parameters()) / 1e9
    zero = f"ZeRO-{get_zero_stage(training_args.deepspeed)}" if training_args.deepspeed else "no DeepSpeed"
    rows = "packed rows" if data_args.use_packed_ds else "padded samples"
    return (
        f"{model_args.model_name_or_path}: {num_parameters:.2f}B parameters, {num_trainable:.1f}M trainable\n"
        f"micro-batch: {training_args.per_device_train_batch_size} {rows} of {row.tokens:,} tokens and at most "
        f"{row.tiles} tiles; {zero}; GPUs: {num_gpus}\n"
        f"GiB per GPU, all estimated; `yes`: the total is at most {MAX_SHARE:.0%} of the memory of a GPU\n"
    )


def format_table(estimates: dict[str, MemoryEstimate]) -> str:
    """Format one line per estimate."""
    columns = [*MemoryEstimate._fields, "total"]
    lines = [f"{'':22}" + "".join(f"{name:>12}" for name in columns) + "".join(f"{name:>7}" for name in GPU_GIB)]
    for label, memory in estimates.items():
        numbers = "".join(f"{getattr(memory, name) / GIB:12.1f}" for name in columns)
        fits = "".join(f"{'yes' if memory.total <= MAX_SHARE * size * GIB else 'no':>7}" for size in GPU_GIB.values())
        lines.append(f"{label:22}{numbers}{fits}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
