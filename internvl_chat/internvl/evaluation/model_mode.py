"""Run a model for evaluation, and leave it as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from internvl.model.lora import is_peft_model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout, noise, recomputation and gradients.

    Afterwards each module has its own training mode again. Drop path, NEFTune noise, gradient checkpointing and a
    disabled KV cache belong to training mode, and need no switch of their own.
    """
    training_modes = [(module, module.training) for module in model.modules()]
    rope_states = [(module, _copy_rope_state(module)) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, is_training in training_modes:
            module.training = is_training
        for module, state in rope_states:
            for name, value in state.items():
                setattr(module, name, value)


def _copy_rope_state(module: nn.Module) -> dict[str, torch.Tensor | int]:
    """Copy what a rotary embedding learns from the longest sequence so far.

    With `rope_scaling` of type `dynamic`, transformers (5.24) keeps its frequencies for the sequences that follow.
    """
    if not hasattr(module, "rope_type"):
        return {}
    lengths = {name: value for name, value in vars(module).items() if name.endswith("max_seq_len_cached")}
    return lengths | {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """Disable the LoRA adapters of all parts, within a context."""
    # PEFT freezes disabled adapters, and makes all of them trainable when it enables them.
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with ExitStack() as stack:
            for part in filter(is_peft_model, model.children()):
                stack.enter_context(part.disable_adapter())
            yield
    finally:
        for parameter, is_trainable in requires_grad:
            parameter.requires_grad_(is_trainable)
