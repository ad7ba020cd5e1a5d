"""Merging LoRA adapters into the weights of their layers.

Used by `tools/merge_lora.py`, by training that starts from an adapted model, and by tools that need plain weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from internvl.model.internvl_chat.zero3 import gathered_parameters, is_partitioned
from internvl.model.lora import LORA_RANK_FIELDS, is_adapter_parameter, is_peft_model

# Largest difference of a merged layer's outputs from the adapted one's, in float32, relative to the largest output.
MERGE_TOLERANCE = 1e-3


@torch.no_grad()
def merge_adapters(model):
    """Merge all adapters into their layers, in place.

    Weight and adapter are added in float32 and rounded once, to the dtype of the weight. One layer at a time is in
    float32: peak memory is the model and its largest layer. A collective under ZeRO-3.

    Returns:
        The model without adapters. Its configuration has none, either.

    Raises:
        ValueError: a weight is quantized or shared with another layer, or a merged layer computes something else.
    """
    for part in LORA_RANK_FIELDS:
        if is_peft_model(module := getattr(model, part)):
            _refuse_shared_weights(module)
            for layer in find_lora_layers(module):
                _merge_layer(layer)
            for layer in find_token_layers(module):
                layer.merge()
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


def _refuse_shared_weights(module: nn.Module):
    """Raise a ValueError if an adapted weight also belongs to a layer without adapter.

    Merging the adapter would change that layer, too: the input embeddings, if the LM head is tied to them.
    """
    layers: list[Any] = find_lora_layers(module)  # a mixin of modules
    adapted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    own = {id(submodule) for layer in layers for submodule in layer.modules()}
    for name, other in module.named_modules():
        for parameter in other.parameters(recurse=False):
            if id(parameter) in adapted and id(other) not in own:
                raise ValueError(
                    f"Merging is not supported: an adapted layer shares its weight with {name}, which has no adapter "
                    "and would change, too. Train without LoRA in the LM head."
                )


def _merge_layer(layer: Any):
    """Merge the adapter of a layer in float32, and compare its outputs.

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
        # Other layers hold experts, whose inputs are routed. Under ZeRO-3 a call would release the gathered weights.
        is_checked = isinstance(layer, Linear) and not is_partitioned(parameters[0])
        before = _compute_probe_output(layer) if is_checked else None
        layer.merge()
        if before is not None:
            error = (_compute_probe_output(layer) - before).abs().max()
            if not error <= MERGE_TOLERANCE * before.abs().max():
                raise ValueError(
                    f"Merging failed: a merged layer of shape {tuple(parameters[0].shape)} differs from the "
                    f"adapted one by {error:.2g} in float32, with outputs up to {before.abs().max():.2g}."
                )
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def _compute_probe_output(layer: Any) -> torch.Tensor:
    """Compute the output of a layer for four fixed random inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = layer.get_base_layer().weight
    inputs = torch.randn(4, layer.in_features, generator=generator).to(weight)
    layer.eval()  # without dropout
    return Linear.forward(layer, inputs)


def find_token_layers(module: nn.Module) -> list[Any]:
    """Find PEFT's TrainableTokensLayers, which hold rows of new tokens.

    By their attribute: PEFT 0.10, which upstream pins, has no such class.
    """
    return [m for m in module.modules() if isinstance(getattr(m, "trainable_tokens_delta", None), nn.ParameterDict)]


def find_lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def get_adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if is_adapter_parameter(name))
