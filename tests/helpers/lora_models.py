"""Chat models with LoRA adapters that have an effect."""

import torch
from torch import nn

from internvl.model.internvl_chat import InternVLChatModel

ADAPTED_PARTS = {
    "vision": ("vision_model",),
    "llm": ("language_model",),
    "both": ("vision_model", "language_model"),
}


def add_lora(model: InternVLChatModel, parts: str, r: int = 4, dropout: float = 0.0) -> InternVLChatModel:
    """Add adapters to the parts in `ADAPTED_PARTS[parts]`."""
    if "vision_model" in ADAPTED_PARTS[parts]:
        model.wrap_backbone_lora(r=r, lora_alpha=2 * r, lora_dropout=dropout)
    if "language_model" in ADAPTED_PARTS[parts]:
        model.wrap_llm_lora(r=r, lora_alpha=2 * r, lora_dropout=dropout)
    return model


def get_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def randomize_adapters(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Draw the weights of all adapters; new adapters would have no effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in get_adapters(model).values():
        parameter.normal_(std=std, generator=generator)
    return model
