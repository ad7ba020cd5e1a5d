"""Optimizer parameter groups: learning rate and weight decay of each part of the model."""

import re
from functools import partial

from torch import nn

from internvl.arguments.per_part import NAMES, RATES, given
from internvl.arguments.training import TrainingArguments
from internvl.model.lora import PART_FLAGS, unwrap_peft


def num_elements(parameter: nn.Parameter) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_numel", parameter.numel())


def rates_of_part(args: TrainingArguments, part: str) -> dict:
    """Learning rate, weight decay and LoRA+ ratio of a part, as its own flags say or those of the whole run."""
    whole = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "loraplus_lr_ratio": 1.0}
    return whole | given(args, PART_FLAGS[part], RATES)


def trainable_parts(model: nn.Module) -> list[str]:
    return [part for part in PART_FLAGS if any(p.requires_grad for p in getattr(model, part).parameters())]


def build_param_groups(model: nn.Module, args: TrainingArguments) -> list[dict]:
    """One optimizer group a part that trains, or one for each learning rate in it.

    As in upstream, weight decay acts on every trained tensor. LoRA+ (https://arxiv.org/abs/2402.12354) gives the B of
    adapters a higher learning rate; --backbone_layer_decay gives each unfrozen vision layer, and the embeddings below
    them, a lower one than the layer above it (https://arxiv.org/abs/2106.08254).

    Raises:
        ValueError: a flag of a part in which nothing trains that it acts on.
    """
    groups = {}
    for part, flag in PART_FLAGS.items():
        trained = [(name, p) for name, p in getattr(model, part).named_parameters() if p.requires_grad]
        refuse_rates_without_effect(part, [name for name, _ in trained], args)
        own = rates_of_part(args, part)
        factor = partial(rate_factor, part, args, len(unwrap_peft(model.vision_model).encoder.layers))
        for name, parameter in trained:
            key = (NAMES[flag], factor(name))
            group = {"name": NAMES[flag], "lr": own["lr"] * key[1], "weight_decay": own["weight_decay"], "params": []}
            groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def rate_factor(part: str, args: TrainingArguments, vision_layers: int, name: str) -> float:
    """What the learning rate of the part is multiplied with for the tensor of that name."""
    if ".lora_" in name:
        return rates_of_part(args, part)["loraplus_lr_ratio"] if ".lora_B." in name else 1.0
    if part != "vision_model" or args.backbone_layer_decay is None:
        return 1.0
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    return args.backbone_layer_decay ** (vision_layers - 1 - int(layer[1]) if layer else vision_layers)


def refuse_rates_without_effect(part: str, trained: list[str], args: TrainingArguments) -> None:
    adapters = [name for name in trained if ".lora_" in name]
    acted_on = {"lr": trained, "weight_decay": trained, "loraplus_lr_ratio": adapters}
    flags = [(f"{PART_FLAGS[part]}_{setting}", acted_on[setting]) for setting in given(args, PART_FLAGS[part], RATES)]
    if part == "vision_model" and args.backbone_layer_decay is not None:
        flags.append(("backbone_layer_decay", set(trained) - set(adapters)))
    for flag, names in flags:
        value, adapted = getattr(args, flag), "adapter" if flag.endswith("ratio") else "weight"
        if not names:
            raise ValueError(f"--{flag} {value} does not act: no {adapted} of the {NAMES[PART_FLAGS[part]]} trains.")
        if value < 0 or (value == 0 and not flag.endswith(("lr", "weight_decay"))):
            raise ValueError(f"--{flag} {value} must be positive.")
