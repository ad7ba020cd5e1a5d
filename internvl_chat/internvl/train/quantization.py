"""QLoRA: 4-bit base weights below the adapters of a part."""

import importlib.util
from importlib.metadata import version

import torch
from packaging.version import Version
from transformers import BitsAndBytesConfig, PreTrainedModel

from internvl.arguments.deepspeed_config import get_zero_stage
from internvl.arguments.model import ModelArguments
from internvl.arguments.training import TrainingArguments
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.lora import LORA_RANK_FIELDS, PART_FLAGS

MIN_VERSION_ON_CPU = Version("0.49")  # of bitsandbytes


def is_quantized(model_args: ModelArguments, part: str) -> bool:
    """Check whether the flags ask for 4-bit weights in a part."""
    return getattr(model_args, f"quantize_{PART_FLAGS[part]}", False)  # the projector has no such flag


def build_quantization_kwargs(
    model_args: ModelArguments, training_args: TrainingArguments, compute_dtype: torch.dtype
) -> dict:
    """Build arguments of `from_pretrained` that load parts in 4 bits.

    The weights are NF4 with quantized scales (https://arxiv.org/abs/2305.14314). Without --quantize_* the result is
    empty.

    Raises:
        ValueError: quantization is not supported with the other flags, or on this machine.
    """
    parts = [part for part in PART_FLAGS if is_quantized(model_args, part)]
    for part in parts:
        if reason := find_quantization_obstacle(part, model_args, training_args):
            raise ValueError(f"--quantize_{PART_FLAGS[part]} True {reason}.")
    if not parts:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # The LM head (`output` in InternLM2), and the parts that are not quantized.
        llm_int8_skip_modules=["lm_head", "output", *(part for part in LORA_RANK_FIELDS if part not in parts)],
    )
    return {"quantization_config": config, "device_map": {"": training_args.device}}


def find_quantization_obstacle(part: str, model_args: ModelArguments, training_args: TrainingArguments) -> str | None:
    """Return what prevents the quantization of a part, if anything.

    The result completes an error message that begins with the flag.
    """
    path = model_args.model_name_or_path
    config = InternVLChatConfig.from_pretrained(path) if path else None
    zero_stage = get_zero_stage(training_args.deepspeed)
    has_adapters = config is not None and any(getattr(config, rank) for rank in LORA_RANK_FIELDS.values())
    is_installed = importlib.util.find_spec("bitsandbytes") is not None
    is_supported = is_installed and (
        torch.cuda.is_available() or Version(version("bitsandbytes")) >= MIN_VERSION_ON_CPU
    )
    obstacles = {
        "requires the package bitsandbytes: pip install bitsandbytes": not is_installed,
        f"requires a CUDA device, or bitsandbytes >= {MIN_VERSION_ON_CPU}": not is_supported,
        f"requires adapters: set --{LORA_RANK_FIELDS[part]}": not getattr(model_args, LORA_RANK_FIELDS[part]),
        "is not supported under ZeRO-3, which cannot partition 4-bit weights: use ZeRO-2": zero_stage == 3,
        "is not supported with --save_full_model True: 4-bit weights would be saved": training_args.save_full_model,
        "is not supported with PiSSA, which changes the base weights: quantize a merged checkpoint": (
            getattr(model_args, f"{PART_FLAGS[part]}_lora_variant") == "pissa"
        ),
        "requires a chat checkpoint: set --model_name_or_path": config is None,
        # Base weights and adapters in one file, as upstream saves them; an adapter checkpoint has `base_model`.
        "is not supported for a full checkpoint with adapters: merge them first with `internvl merge`": (
            has_adapters and not hasattr(config, "base_model")
        ),
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)


def allow_training_quantized(model: PreTrainedModel) -> None:
    """Prepare a quantized model for transformers' Trainer.

    The Trainer rejects quantized models without adapters. It looks for adapters in the model itself (transformers
    5.23), but here they are in the parts.
    """
    model._hf_peft_config_loaded = True
    for module in model.modules():
        # On CPUs with AVX-512 BF16, a layer of bitsandbytes 0.50 in evaluation mode rearranges its weights for good and
        # rounds their scales to bf16: the training after that would be another one.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # pyrefly: ignore[bad-argument-type]  # not a module or tensor
            module.support_avx512bf16_for_cpu = False
