"""Merging LoRA adapters into the weights of their layers.

Used by `tools/merge_lora.py`, by training that starts from an adapted model, and by tools that need plain weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from internvl.model.internvl_chat.zero3 import gathered_parameters
from internvl.model.lora import LORA_RANK_FIELDS, is_adapter_parameter, is_peft_model


@torch.no_grad()
def merge_adapters(model):
    """Merge all adapters into their layers, in place.

    Weight and adapter are added in float32 and rounded once, to the dtype of the weight. One layer at a time is in
    float32: peak memory is the model and its largest layer. A collective under ZeRO-3.

    Returns:
        The model without adapters. Its configuration has none, either.

    Raises:
        ValueError: a weight is quantized.
    """
    for part in LORA_RANK_FIELDS:
        if is_peft_model(module := getattr(model, part)):
            for layer in find_lora_layers(module):
                _merge_layer(layer)
            setattr(model, part, module.unload())
    remove_adapter_fields(model.config)
    # transformers 5 saves tensors under the names from which it loaded them. Names of adapted experts are PEFT's.
    model.__dict__.pop("_weight_conversions", None)
    return model


def remove_adapter_fields(config):
    """Remove adapters and base model from a configuration, in place."""
    for rank_field in LORA_RANK_FIELDS.values():
        setattr(config, rank_field, 0)
    config.lora_settings = None
    config.__dict__.pop("base_model", None)
    return config


def _merge_layer(layer: Any):
    """Merge the adapter of a layer in float32.

    `layer` is a PEFT LoraLayer, which is a mixin of modules.
    """
    parameters = list(layer.parameters())
    if quantized := {parameter.dtype for parameter in parameters if not parameter.is_floating_point()}:
        raise ValueError(
            f"Merging adapters into weights of type {quantized.pop()} is not supported: load the base model without "
            "quantization."
        )
    dtypes = [parameter.dtype for parameter in parameters]
    with gathered_parameters(*parameters):
        for parameter in parameters:
            parameter.data = parameter.data.float()
        layer.merge()
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def find_lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def get_adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if is_adapter_parameter(name))
