"""What trains: freezing, unfreezing and LoRA in one function, the printed table, the optimizer's groups, and the check
that gradients arrive.

Called by `build.py` on a loaded model; `trainer.py` takes the parameter groups from here.
"""

import logging
import re

from torch import nn

from internvl.arguments.per_part import LORA, NAMES, given
from internvl.arguments.training import ModelArguments, TrainingArguments
from internvl.model.internvl_chat.lora_mixin import lora_settings_of
from internvl.model.lora import LORA_RANK_FIELDS, PART_FLAGS, LoraSettings, is_peft_model, unwrap_peft
from internvl.train.param_groups import build_param_groups, num_elements

logger = logging.getLogger(__name__)
MAX_LORA_RANK = 2**16  # of adapters; no published layer is as wide


def set_trainable(model: nn.Module, args: ModelArguments) -> None:
    """Freeze, wrap and unfreeze the parts of a chat model as the flags say.

    A checkpoint that already holds the adapters asked for goes on with them.

    Raises:
        ValueError: when the checkpoint holds other adapters, or when nothing is left to train.
    """
    for part, frozen in zip(LORA_RANK_FIELDS, (args.freeze_backbone, args.freeze_mlp, args.freeze_llm), strict=True):
        if frozen:
            getattr(model, part).requires_grad_(False)
        add_lora(model, part, args)
    if args.unfreeze_lm_head:
        model.language_model.get_output_embeddings().requires_grad_(True)
    set_vision_layers(model, args.unfreeze_vit_layers)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing is left to train: vision encoder, projector and language model are frozen and no LoRA rank is "
            "set; set --use_backbone_lora or --use_llm_lora, or leave one part unfrozen."
        )


def set_vision_layers(model: nn.Module, unfreeze: int) -> None:
    """Unfreeze the vision layers [unfreeze:], unless it is 0; freeze those whose output nobody reads."""
    layers = unwrap_peft(model.vision_model).encoder.layers
    if not -len(layers) <= unfreeze < len(layers):
        raise ValueError(
            f"--unfreeze_vit_layers {unfreeze}: the vision encoder has {len(layers)} layers, so that a first one to "
            f"train is given by {-len(layers)} to {len(layers) - 1}."
        )
    if unfreeze:
        layers[unfreeze:].requires_grad_(True)
    # Hidden state 0 is the embeddings, state k the output of layer k - 1.
    read = model.select_layer % (len(layers) + 1)
    if read < len(layers):
        logger.info("with --vision_select_layer %d vision layers %d and up do nothing", model.select_layer, read)
        layers[read:].requires_grad_(False)


def add_lora(model: nn.Module, part: str, args: ModelArguments) -> None:
    """Give a part the adapters that the flags ask for, or train on with those that it has."""
    rank, asked = getattr(args, LORA_RANK_FIELDS[part]), given(args, PART_FLAGS[part], LORA)
    if rank < 0:
        raise ValueError(f"--{LORA_RANK_FIELDS[part]} {rank}: a LoRA rank is positive, or 0 for none.")
    if rank > MAX_LORA_RANK:
        raise ValueError(f"--{LORA_RANK_FIELDS[part]} {rank}: a LoRA rank is at most {MAX_LORA_RANK:,}.")
    if asked and not rank:
        flag, value = next(iter(asked.items()))
        raise ValueError(
            f"--{PART_FLAGS[part]}_{flag} {value} acts on adapters, which --{LORA_RANK_FIELDS[part]} 0 does not add."
        )
    module = getattr(model, part)
    if rank and is_peft_model(module) and continues_adapters(model.config, part, args):
        module.set_adapter(module.active_adapter)  # freezing the part froze them too
    elif rank:
        model.add_part_adapters(
            part, LoraSettings(**{"r": rank, "alpha": 2 * rank, **lora_settings_from_flags(args, part)})
        )


def lora_settings_from_flags(args: ModelArguments, part: str) -> dict:
    """Fields of `LoraSettings` that the command line gives for a part."""
    asked = {name.removeprefix("lora_"): value for name, value in given(args, PART_FLAGS[part], LORA).items()}
    if "layers" in asked:
        if not (match := re.fullmatch(r"(-?\d*):(-?\d*)", asked["layers"])):
            raise ValueError(f"--{PART_FLAGS[part]}_lora_layers {asked['layers']}: not START:STOP, such as 0:12 or -8:")
        asked["layers"] = [int(number) if number else None for number in match.groups()]
    return asked


def continues_adapters(config, part: str, args: ModelArguments) -> bool:
    """Whether the adapters that a checkpoint with this config has in a part are those that the flags ask for."""
    held = lora_settings_of(config, part)
    asked = {"r": getattr(args, LORA_RANK_FIELDS[part]), **lora_settings_from_flags(args, part)}
    return all(getattr(held, name) == value for name, value in asked.items())


def trainable_table(model: nn.Module, args: TrainingArguments) -> str:
    """The table of parts that a run prints before its first step."""
    rows = [("part", "parameters", "trained", "share", "LoRA rank", "learning rate")]
    groups = build_param_groups(model, args)
    for part, flag in PART_FLAGS.items():
        parameters = list(getattr(model, part).parameters())
        total = sum(map(num_elements, parameters))
        trained = sum(num_elements(p) for p in parameters if p.requires_grad)
        rates = sorted({f"{group['lr']:g}" for group in groups if group["name"] == NAMES[flag]}, key=float)
        rate = " to ".join(dict.fromkeys((rates[0], rates[-1]))) if rates else "-"
        rows.append(
            (NAMES[flag], f"{total:,}", f"{trained:,}", f"{trained / total:.2%}", describe_lora(model, part), rate)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def describe_lora(model: nn.Module, part: str) -> str:
    """A part's LoRA rank, with its variant where that is another than LoRA."""
    if not is_peft_model(getattr(model, part)):
        return "-"
    settings = lora_settings_of(model.config, part)
    return f"{settings.r}" if settings.variant == "lora" else f"{settings.r} {settings.variant}"
