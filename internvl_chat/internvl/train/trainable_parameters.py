"""What trains: freezing, unfreezing and LoRA in one function, the printed table, the optimizer's groups, and the check
that gradients arrive.

Called by `build.py` on a loaded model; `trainer.py` takes the parameter groups from here.
"""

import logging
import re

from torch import nn

from internvl.arguments.per_part import LORA, NAMES, given
from internvl.arguments.training import ModelArguments, TrainingArguments
from internvl.model.internvl_chat.lora_mixin import configured
from internvl.model.lora import FLAGS, RANKS, LoraSettings, is_wrapped, plain
from internvl.train.param_groups import parameter_groups, size

logger = logging.getLogger(__name__)
HIGHEST_RANK = 2**16  # of adapters; no published layer is as wide


def set_trainable(model: nn.Module, args: ModelArguments) -> None:
    """Freeze, wrap and unfreeze the parts of a chat model as the flags say.

    A checkpoint that already holds the adapters asked for goes on with them.

    Raises:
        ValueError: when the checkpoint holds other adapters, or when nothing is left to train.
    """
    for part, frozen in zip(RANKS, (args.freeze_backbone, args.freeze_mlp, args.freeze_llm), strict=True):
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
    layers = plain(model.vision_model).encoder.layers
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
    rank, asked = getattr(args, RANKS[part]), given(args, FLAGS[part], LORA)
    if rank < 0:
        raise ValueError(f"--{RANKS[part]} {rank}: a LoRA rank is positive, or 0 for none.")
    if rank > HIGHEST_RANK:
        raise ValueError(f"--{RANKS[part]} {rank}: a LoRA rank is at most {HIGHEST_RANK:,}.")
    if asked and not rank:
        flag, value = next(iter(asked.items()))
        raise ValueError(f"--{FLAGS[part]}_{flag} {value} acts on adapters, which --{RANKS[part]} 0 does not add.")
    module = getattr(model, part)
    if rank and is_wrapped(module) and goes_on(model.config, part, args):
        module.set_adapter(module.active_adapter)  # freezing the part froze them too
    elif rank:
        model.wrap_part(part, LoraSettings(**{"r": rank, "alpha": 2 * rank, **asked_settings(args, part)}))


def asked_settings(args: ModelArguments, part: str) -> dict:
    """Fields of `LoraSettings` that the command line gives for a part."""
    asked = {name.removeprefix("lora_"): value for name, value in given(args, FLAGS[part], LORA).items()}
    if "layers" in asked:
        if not (match := re.fullmatch(r"(-?\d*):(-?\d*)", asked["layers"])):
            raise ValueError(f"--{FLAGS[part]}_lora_layers {asked['layers']}: not START:STOP, such as 0:12 or -8:")
        asked["layers"] = [int(number) if number else None for number in match.groups()]
    return asked


def goes_on(config, part: str, args: ModelArguments) -> bool:
    """Whether the adapters that a checkpoint with this config has in a part are those that the flags ask for."""
    held = configured(config, part)
    asked = {"r": getattr(args, RANKS[part]), **asked_settings(args, part)}
    return all(getattr(held, name) == value for name, value in asked.items())


def trainable_table(model: nn.Module, args: TrainingArguments) -> str:
    """The table of parts that a run prints before its first step."""
    rows = [("part", "parameters", "trained", "share", "LoRA rank", "learning rate")]
    groups = parameter_groups(model, args)
    for part, flag in FLAGS.items():
        parameters = list(getattr(model, part).parameters())
        total = sum(map(size, parameters))
        trained = sum(size(p) for p in parameters if p.requires_grad)
        rates = sorted({f"{group['lr']:g}" for group in groups if group["name"] == NAMES[flag]}, key=float)
        rate = " to ".join(dict.fromkeys((rates[0], rates[-1]))) if rates else "-"
        rows.append((NAMES[flag], f"{total:,}", f"{trained:,}", f"{trained / total:.2%}", lora_of(model, part), rate))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def lora_of(model: nn.Module, part: str) -> str:
    """A part's LoRA rank, with its variant where that is another than LoRA."""
    if not is_wrapped(getattr(model, part)):
        return "-"
    settings = configured(model.config, part)
    return f"{settings.r}" if settings.variant == "lora" else f"{settings.r} {settings.variant}"
