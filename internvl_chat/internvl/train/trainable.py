"""What trains: freezing, unfreezing and LoRA in one function, the printed table, the optimizer's groups, and the check
that gradients arrive.

Called by `build.py` on a loaded model; `trainer.py` takes the parameter groups from here.
"""

import logging
import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from internvl.model.internvl_chat.adapting import configured
from internvl.model.lora import FLAGS, RANKS, LoraSettings, is_wrapped, plain
from internvl.train.arguments import ModelArguments, TrainingArguments
from internvl.train.part_arguments import LORA, NAMES, RATES, given

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


def size(parameter: nn.Parameter) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_numel", parameter.numel())


def rates(args: TrainingArguments, part: str) -> dict:
    """Learning rate, weight decay and LoRA+ ratio of a part, as its own flags say or those of the whole run."""
    whole = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "loraplus_lr_ratio": 1.0}
    return whole | given(args, FLAGS[part], RATES)


def trained_parts(model: nn.Module) -> list[str]:
    return [part for part in FLAGS if any(p.requires_grad for p in getattr(model, part).parameters())]


def parameter_groups(model: nn.Module, args: TrainingArguments) -> list[dict]:
    """One optimizer group a part that trains, or one for each learning rate in it.

    As in upstream, weight decay acts on every trained tensor. LoRA+ (https://arxiv.org/abs/2402.12354) gives the B of
    adapters a higher learning rate; --backbone_layer_decay gives each unfrozen vision layer, and the embeddings below
    them, a lower one than the layer above it (https://arxiv.org/abs/2106.08254).

    Raises:
        ValueError: a flag of a part in which nothing trains that it acts on.
    """
    groups = {}
    for part, flag in FLAGS.items():
        trained = [(name, p) for name, p in getattr(model, part).named_parameters() if p.requires_grad]
        refuse_idle_rates(part, [name for name, _ in trained], args)
        own = rates(args, part)
        factor = partial(rate_factor, part, args, len(plain(model.vision_model).encoder.layers))
        for name, parameter in trained:
            key = (NAMES[flag], factor(name))
            group = {"name": NAMES[flag], "lr": own["lr"] * key[1], "weight_decay": own["weight_decay"], "params": []}
            groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def rate_factor(part: str, args: TrainingArguments, vision_layers: int, name: str) -> float:
    """What the learning rate of the part is multiplied with for the tensor of that name."""
    if ".lora_" in name:
        return rates(args, part)["loraplus_lr_ratio"] if ".lora_B." in name else 1.0
    if part != "vision_model" or args.backbone_layer_decay is None:
        return 1.0
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    return args.backbone_layer_decay ** (vision_layers - 1 - int(layer[1]) if layer else vision_layers)


def refuse_idle_rates(part: str, trained: list[str], args: TrainingArguments) -> None:
    adapters = [name for name in trained if ".lora_" in name]
    acted_on = {"lr": trained, "weight_decay": trained, "loraplus_lr_ratio": adapters}
    flags = [(f"{FLAGS[part]}_{setting}", acted_on[setting]) for setting in given(args, FLAGS[part], RATES)]
    if part == "vision_model" and args.backbone_layer_decay is not None:
        flags.append(("backbone_layer_decay", set(trained) - set(adapters)))
    for flag, names in flags:
        value, adapted = getattr(args, flag), "adapter" if flag.endswith("ratio") else "weight"
        if not names:
            raise ValueError(f"--{flag} {value} does not act: no {adapted} of the {NAMES[FLAGS[part]]} trains.")
        if value < 0 or (value == 0 and not flag.endswith(("lr", "weight_decay"))):
            raise ValueError(f"--{flag} {value} must be positive.")


def watch_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Callable[..., None]:
    """Look at the gradients of the steps to come, until the returned function is called.

    That function raises a ValueError that names the trainable tensors which got no gradient, or, unless it is called
    with `finite=False`, one that is not finite.
    Works on hooks, so that it sees gradients that DeepSpeed reduces and frees at once.
    """
    found: dict[str, torch.Tensor] = {}

    def note(name: str, gradient: torch.Tensor) -> None:
        found[name] = torch.isfinite(gradient).all() & found.get(name, True)

    watched = {name: p.register_hook(partial(note, name)) for name, p in named_parameters if p.requires_grad}

    def check(finite: bool = True) -> None:
        for handle in watched.values():
            handle.remove()
        complain("got no gradient", [name for name in watched if name not in found], len(watched))
        if finite:
            complain("got a gradient that is not finite", [n for n, ok in found.items() if not ok], len(watched))

    return check


def complain(what: str, names: list[str], total: int) -> None:
    if names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"after the first step {len(names)} of {total} trainable tensors {what}: {listed}")
