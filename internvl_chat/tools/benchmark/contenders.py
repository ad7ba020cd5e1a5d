"""Contenders of `tools/benchmark_step.py`: our model, and transformers' class with PEFT.

All have the same weights and adapters, take the same batches and return a loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import InternVLForConditionalGeneration

from internvl.arguments.model import ModelArguments
from internvl.model.activation_checkpointing import compile_layers
from internvl.model.hf.adapter import PartAdapter, convert_adapters_to_hf
from internvl.model.hf.config import convert_config_to_hf
from internvl.model.hf.weights import convert_weights_to_hf
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import PEFT_PREFIX
from internvl.model.varlen_attention import use_varlen_attention
from internvl.train.build_model import set_up_gradient_checkpointing

from .sizes import ModelSize, build_random_model, get_image_token_id, set_default_dtype

# --lora -> parts with adapters. All else is frozen.
LORA_PARTS = {"vision+llm": ("vision_model", "language_model"), "llm": ("language_model",)}


class Contender(NamedTuple):
    """A model with its loss function, and the layout of its batches."""

    build_fn: Callable[[ModelSize, bool, float, str], nn.Module]  # size, gradient checkpointing, dropout, --lora
    loss_fn: Callable[[nn.Module, dict], torch.Tensor]  # mean loss of a batch
    packed: bool = False  # packed rows; otherwise padded batches
    group_by_length: bool = False  # padded batches of samples of similar length
    needs_checkpointing: bool = False  # measured with gradient checkpointing only


def build_ours(
    size: ModelSize,
    checkpointing: bool,
    dropout: float,
    lora: str = "vision+llm",
    checkpoint_ratio: float = 1.0,
    use_liger: bool = False,
    compiled: bool = False,
) -> InternVLChatModel:
    """Build our model as a fine-tuning run with LoRA does.

    The flags are --freeze_backbone True --freeze_mlp True --freeze_llm True --use_backbone_lora R --use_llm_lora R.
    """
    model = build_random_model(size)
    if use_liger:
        use_liger_kernels(model)
    use_varlen_attention(model.language_model, packed=True)
    model = freeze_and_add_lora(model, size, dropout, lora)
    arguments = ModelArguments(grad_checkpoint=checkpointing, grad_checkpoint_ratio=checkpoint_ratio)
    set_up_gradient_checkpointing(model, arguments)
    if compiled:
        compile_layers(model.vision_model)
        compile_layers(model.language_model)
    return model.train()


def freeze_and_add_lora(model: InternVLChatModel, size: ModelSize, dropout: float, lora: str) -> InternVLChatModel:
    """Freeze the model and add LoRA to the parts of `--lora`."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    add_fns = {"vision_model": model.wrap_backbone_lora, "language_model": model.wrap_llm_lora}
    for part in LORA_PARTS[lora]:
        add_fns[part](size.rank, 2 * size.rank, dropout)
    return model


def build_transformers(size: ModelSize, checkpointing: bool, dropout: float, lora: str = "vision+llm") -> PeftModel:
    """Build transformers' InternVL with PEFT, weights and adapters as in ours.

    Where our model has one fused matrix (QKV) and transformers has several, each of these gets its own adapter of the
    same rank.
    """
    source = build_random_model(size)
    llm_config = source.config.llm_config
    config = convert_config_to_hf(source.config, get_image_token_id(source.config), is_tied=False)
    # flash-attn where our model uses it
    config._attn_implementation = llm_config._attn_implementation or "sdpa"
    with set_default_dtype(size.dtype):
        model = InternVLForConditionalGeneration(config)
    model.load_state_dict(dict(convert_weights_to_hf(source.state_dict(), llm_config)))
    text_config: Any = model.config.text_config
    model.config.use_cache = text_config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    source = freeze_and_add_lora(source, size, dropout, lora)
    adapters = {part: _get_adapter(getattr(source, part)) for part in LORA_PARTS[lora]}
    lora_config, state_dict = convert_adapters_to_hf(adapters, llm_config, config)
    lora_config.lora_dropout, lora_config.inference_mode = dropout, False
    model = get_peft_model(model, lora_config)
    set_peft_model_state_dict(model, state_dict)
    return model.train()


def _get_adapter(part: PeftModel) -> PartAdapter:
    tensors = get_peft_model_state_dict(part)
    config = cast(LoraConfig, part.peft_config[part.active_adapter])
    return config, {name.removeprefix(PEFT_PREFIX): t for name, t in tensors.items()}


def compute_our_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return our model's loss of a batch."""
    return model(**batch).loss


def compute_transformers_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the loss of transformers' class, from the fields it accepts."""
    inputs = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    return model(**inputs, pixel_values=batch["pixel_values"] if len(batch["pixel_values"]) else None).loss


OURS = "ours, packed"
BASELINE = "transformers + peft, by length"
CONTENDERS = {
    OURS: Contender(build_ours, compute_our_loss, packed=True),
    "ours, packed, 4 of 5 layers": Contender(
        partial(build_ours, checkpoint_ratio=0.8), compute_our_loss, packed=True, needs_checkpointing=True
    ),
    "ours, packed, Liger": Contender(partial(build_ours, use_liger=True), compute_our_loss, packed=True),
    "ours, packed, compiled": Contender(partial(build_ours, compiled=True), compute_our_loss, packed=True),
    "ours, padded by length": Contender(build_ours, compute_our_loss, group_by_length=True),
    BASELINE: Contender(build_transformers, compute_transformers_loss, group_by_length=True),
    "transformers + peft, shuffled": Contender(build_transformers, compute_transformers_loss),
}
DEFAULT_CONTENDERS = [OURS, "ours, packed, 4 of 5 layers", BASELINE]
