"""QLoRA (https://arxiv.org/abs/2305.14314): a part's frozen weights in 4 bits, its adapters beside them.

Called by `build.py` for what `InternVLChatModel.from_pretrained` is to be given; bitsandbytes does the rest.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.lora import FLAGS, RANKS
from internvl.train.arguments import ModelArguments, TrainingArguments


def quantization(model_args: ModelArguments, training_args: TrainingArguments, dtype: torch.dtype) -> dict:
    """Arguments of `from_pretrained` that load the parts asked for in NF4, scales quantised, too; none if none is.

    Raises:
        ValueError: where it cannot run, in one sentence.
    """
    parts = [part for part, flag in FLAGS.items() if getattr(model_args, f"quantize_{flag}", False)]
    for part in parts:
        if reason := why_not(part, model_args, training_args):
            raise ValueError(f"--quantize_{FLAGS[part]} True {reason}.")
    if not parts:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "output", *(part for part in RANKS if part not in parts)],
    )
    return {"quantization_config": settings, "device_map": {"": training_args.device}}


def why_not(part: str, model_args: ModelArguments, training_args: TrainingArguments) -> str | None:
    """What is in the way of a part in 4 bits, as the end of a sentence."""
    path = model_args.model_name_or_path
    held = InternVLChatConfig.from_pretrained(path) if path else None
    stage = (training_args.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    in_the_way = {
        "needs a CUDA device": not torch.cuda.is_available(),
        "needs the package bitsandbytes": importlib.util.find_spec("bitsandbytes") is None,
        f"needs adapters, set --{RANKS[part]}": not getattr(model_args, RANKS[part]),
        "does not run under ZeRO-3, which cannot partition 4-bit weights; use ZeRO-2": stage == 3,
        "cannot save the whole model: leave out --save_full_model": training_args.save_full_model,
        "cannot begin with PiSSA, which changes the weights; quantise a merged checkpoint": (
            getattr(model_args, f"{FLAGS[part]}_lora_variant") == "pissa"
        ),
        "needs a chat checkpoint, --model_name_or_path": held is None,
        "goes on with adapters on a base only; merge these first with tools/merge_lora.py": (
            held is not None and not hasattr(held, "base_model") and any(getattr(held, rank) for rank in RANKS.values())
        ),
    }
    return next((reason for reason, found in in_the_way.items() if found), None)
