"""Optimizer parameter groups: learning rate and weight decay per part."""

import re

from torch import nn

from internvl.arguments.per_part import PART_NAMES, PartRateArguments, get_part_settings
from internvl.arguments.training import TrainingArguments
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import PART_FLAGS, unwrap_peft


def count_elements(parameter: nn.Parameter) -> int:
    """Count the elements of a parameter, also if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def find_trainable_parts(model: nn.Module) -> list[str]:
    """List the parts of a chat model that have trainable parameters."""
    return [part for part in PART_FLAGS if any(p.requires_grad for p in getattr(model, part).parameters())]


def resolve_part_rates(args: TrainingArguments, part: str) -> dict:
    """Return learning rate, weight decay and LoRA+ ratio of a part.

    The part's own flags take precedence over --learning_rate and --weight_decay.
    """
    defaults = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "loraplus_lr_ratio": 1.0}
    return defaults | get_part_settings(args, PartRateArguments, PART_FLAGS[part])


def build_param_groups(model: InternVLChatModel, args: TrainingArguments) -> list[dict]:
    """Build a parameter group per part and learning rate.

    As in upstream, weight decay applies to every trainable parameter, norms and biases included.

    Raises:
        ValueError: a flag is set for a part in which it applies to no trainable parameter.
    """
    groups: dict[tuple[str, float], dict] = {}
    num_vision_layers = len(unwrap_peft(model.vision_model).encoder.layers)
    for part, part_flag in PART_FLAGS.items():
        name, rates = PART_NAMES[part_flag], resolve_part_rates(args, part)
        trainable = {key: p for key, p in getattr(model, part).named_parameters() if p.requires_grad}
        validate_part_rates(args, part, list(trainable))
        for key, parameter in trainable.items():
            factor = compute_lr_factor(args, part, key, num_vision_layers)
            group = {"name": name, "lr": rates["lr"] * factor, "weight_decay": rates["weight_decay"], "params": []}
            groups.setdefault((name, factor), group)["params"].append(parameter)
    return list(groups.values())


def compute_lr_factor(args: TrainingArguments, part: str, parameter_name: str, num_vision_layers: int) -> float:
    """Compute the learning rate of a parameter relative to its part's.

    LoRA+ (https://arxiv.org/abs/2402.12354) gives the B matrices of adapters a higher learning rate.
    --backbone_layer_decay gives each unfrozen vision layer, and the embeddings below the layers, a lower learning rate
    than the layer above (https://arxiv.org/abs/2106.08254).
    """
    if ".lora_" in parameter_name:
        return resolve_part_rates(args, part)["loraplus_lr_ratio"] if ".lora_B." in parameter_name else 1.0
    if part != "vision_model" or args.backbone_layer_decay is None:
        return 1.0
    layer = re.search(r"encoder\.layers\.(\d+)\.", parameter_name)
    # The last layer has factor 1; the embeddings count as the layer below layer 0.
    distance = num_vision_layers - 1 - int(layer[1]) if layer else num_vision_layers
    return args.backbone_layer_decay**distance


def validate_part_rates(args: TrainingArguments, part: str, trainable: list[str]) -> None:
    """Raise a ValueError for a rate that has no effect.

    Args:
        trainable: names of the part's trainable parameters.
    """
    part_flag, part_name = PART_FLAGS[part], PART_NAMES[PART_FLAGS[part]]
    adapters = [name for name in trainable if ".lora_" in name]
    others = [name for name in trainable if ".lora_" not in name]
    # setting -> the parameters that it applies to, in words and by name
    scope = {
        "lr": ("parameters", trainable),
        "weight_decay": ("parameters", trainable),
        "loraplus_lr_ratio": ("adapters", adapters),
        "layer_decay": ("parameters besides adapters", others),
    }
    settings = list(get_part_settings(args, PartRateArguments, part_flag))
    if part == "vision_model" and args.backbone_layer_decay is not None:
        settings.append("layer_decay")
    for setting in settings:
        flag, (kind, names) = f"{part_flag}_{setting}", scope[setting]
        value = getattr(args, flag)
        if not names:
            raise ValueError(f"--{flag} {value} has no effect: the {part_name} has no trainable {kind}. Remove it.")
