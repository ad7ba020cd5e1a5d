"""Adapters added into the weights they adapt.

After training (`tools/merge_lora.py`), before a run that starts from an adapted model, and in the tools that want plain
weights. The arithmetic is fp32 and one layer is in fp32 at a time, so the peak is the model and its largest layer.
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from internvl.model.internvl_chat.resize import gathered_parameters
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model


@torch.no_grad()
def merge_adapters(model):
    """Adds the adapters into the weights they adapt, in place: a plain model, and a config that says so.

    A weight and its update are added in fp32 and rounded once, to the dtype that the weight has. A collective under
    ZeRO-3.

    Raises:
        ValueError: a weight is quantised.
    """
    for part in LORA_RANK_FIELDS:
        if is_peft_model(module := getattr(model, part)):
            for layer in lora_layers(module):
                _merge(layer)
            setattr(model, part, module.unload())
    without_adapters(model.config)
    # transformers saves under the names it loaded; those of adapted experts are not the published ones.
    model.__dict__.pop("_weight_conversions", None)
    return model


def without_adapters(config):
    """The config of the same model without adapters, in place."""
    for rank in LORA_RANK_FIELDS.values():
        setattr(config, rank, 0)
    config.lora_settings = None
    config.__dict__.pop("base_model", None)
    return config


def _merge(layer: LoraLayer):
    parameters = list(layer.parameters())
    if quantised := {parameter.dtype for parameter in parameters if not parameter.is_floating_point()}:
        raise ValueError(f"adapters cannot be merged into weights of type {quantised.pop()}: load the base unquantised")
    dtypes = [parameter.dtype for parameter in parameters]
    with gathered_parameters(*parameters):
        for parameter in parameters:
            parameter.data = parameter.data.float()
        layer.merge()
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if ".lora_" in name)
