"""What trains: freezing, unfreezing and LoRA in one function, the printed table, the optimizer's groups, and the check
that gradients arrive.

Called by `build.py` on a loaded model; `trainer.py` takes the parameter groups from here.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from internvl.model.lora import plain
from internvl.train.arguments import ModelArguments

logger = logging.getLogger(__name__)

# part -> (attribute of the chat model, the config field that holds its LoRA rank)
PARTS = {
    "vision encoder": ("vision_model", "use_backbone_lora"),
    "projector": ("mlp1", None),
    "language model": ("language_model", "use_llm_lora"),
}


def set_trainable(model: nn.Module, args: ModelArguments) -> None:
    """Freeze, wrap and unfreeze the parts of a chat model as the flags say, in upstream's order.

    A checkpoint that already holds adapters of the rank asked for goes on with them.

    Raises:
        ValueError: when the checkpoint holds adapters of another rank, or when nothing is left to train.
    """
    if args.freeze_backbone:
        model.vision_model.requires_grad_(False)
    if args.freeze_llm:
        model.language_model.requires_grad_(False)
    if args.unfreeze_lm_head:
        model.language_model.get_output_embeddings().requires_grad_(True)
    if args.use_backbone_lora:
        add_lora(model, "vision encoder", args.use_backbone_lora, model.wrap_backbone_lora)
    if args.use_llm_lora:
        add_lora(model, "language model", args.use_llm_lora, model.wrap_llm_lora)
        if args.unfreeze_lm_head:  # wrapping froze it again
            model.language_model.get_output_embeddings().requires_grad_(True)
    if args.freeze_mlp:
        model.mlp1.requires_grad_(False)
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


def add_lora(model: nn.Module, part: str, rank: int, wrap: Callable) -> None:
    attribute, rank_field = PARTS[part]
    if rank < 0:
        raise ValueError(f"--{rank_field} {rank}: a LoRA rank is positive, or 0 for none.")
    present = getattr(model.config, rank_field)
    if present == 0:
        wrap(r=rank, lora_alpha=2 * rank)
        setattr(model.config, rank_field, rank)
    elif present == rank:
        wrapped = getattr(model, attribute)
        wrapped.set_adapter(wrapped.active_adapter)  # freezing the part froze them too
    else:
        raise ValueError(
            f"the checkpoint holds adapters of rank {present}, but --{rank_field} asks for {rank}: continue with "
            f"{present}, or merge them first with tools/merge_lora.py."
        )


def trainable_table(model: nn.Module, learning_rate: float) -> str:
    """The table of parts that a run prints before its first step."""
    rows = [("part", "parameters", "trained", "share", "LoRA rank", "learning rate")]
    for part, (attribute, rank_field) in PARTS.items():
        parameters = list(getattr(model, attribute).parameters())
        total = sum(map(size, parameters))
        trained = sum(size(p) for p in parameters if p.requires_grad)
        rank = getattr(model.config, rank_field) if rank_field else 0
        rate = f"{learning_rate:g}" if trained else "-"
        rows.append((part, f"{total:,}", f"{trained:,}", f"{trained / total:.2%}", str(rank or "-"), rate))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def size(parameter: nn.Parameter) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_numel", parameter.numel())


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """One optimizer group a part that trains. As in upstream, weight decay acts on every trained tensor."""
    groups = []
    for part, (attribute, _) in PARTS.items():
        trained = [p for p in getattr(model, attribute).parameters() if p.requires_grad]
        if trained:
            groups.append({"name": part, "params": trained, "lr": learning_rate, "weight_decay": weight_decay})
    return groups


def watch_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Callable[[], None]:
    """Look at the gradients of the steps to come, until the returned function is called.

    That function raises a ValueError that names the trainable tensors which got no gradient, or one that is not finite.
    Works on hooks, so that it sees gradients that DeepSpeed reduces and frees at once.
    """
    finite: dict[str, torch.Tensor] = {}

    def note(name: str, gradient: torch.Tensor) -> None:
        finite[name] = torch.isfinite(gradient).all() & finite.get(name, True)

    watched = {name: p.register_hook(partial(note, name)) for name, p in named_parameters if p.requires_grad}

    def check() -> None:
        for handle in watched.values():
            handle.remove()
        complain("got no gradient", [name for name in watched if name not in finite], len(watched))
        complain("got a gradient that is not finite", [n for n, ok in finite.items() if not ok], len(watched))

    return check


def complain(what: str, names: list[str], total: int) -> None:
    if names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"after the first step {len(names)} of {total} trainable tensors {what}: {listed}")
