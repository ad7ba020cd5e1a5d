"""Gradient checkpointing and compilation of transformer layers.

The layers are those of a vision encoder or an LLM. `train/build_model.py` applies both after adapters are attached and
parameters are frozen. Checkpointing is never reentrant: adapters get gradients even if the input of their layer needs
none, and dropout draws the same numbers in the recomputation.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from internvl.model.internvl_chat.modeling_intern_vit import InternVisionEncoderLayer
from internvl.model.lora import unwrap_peft
from internvl.model.lora_linear import LoraLinear

# SDPA's kernels, flash-attn 2 and 3, and `torch_attn._varlen_attn`, without their backward passes.
_ATTENTION_OPS = (
    r"scaled_dot_product_\w*attention(?!\w*backward)\w*|flash_attn\w*(forward|fwd)|flash_attn_3\.fwd|varlen_attn"
)
# --grad_checkpoint_keep -> pattern of the torch operators whose outputs are saved in a recomputed layer.
# Two kinds of matrix products are always recomputed: batched ones (bmm), which may be attention scores of L x L
# elements, and those of experts, whose outputs transformers 5 modifies in place by adding biases.
SAVED_OPS = {
    "none": None,
    "attention": rf"\b_?({_ATTENTION_OPS})\b",
    "matmul": rf"\b_?({_ATTENTION_OPS}|mm|addmm)\b",
}


def find_transformer_layers(module: nn.Module) -> list[Any]:
    """List the layers of a vision encoder or LLM in order."""
    return [m for m in module.modules() if isinstance(m, (InternVisionEncoderLayer, GradientCheckpointingLayer))]


def apply_gradient_checkpointing(module: nn.Module, ratio: float = 1.0, keep: str = "none") -> None:
    """Set which layers of a vision encoder or LLM recompute their activations.

    Args:
        ratio: share of the layers, evenly spread from the first on; 0.5 is every second layer, 0 none.
        keep: which outputs are saved nevertheless, a key of `SAVED_OPS`.

    Raises:
        ValueError: outputs are saved and attention has dropout. Recomputation skips the saved attention and its random
            numbers, so all later dropout in the layer would draw other numbers.
    """
    model = unwrap_peft(module)
    dropout = getattr(model.config, "attention_dropout", 0)
    if ratio and dropout and keep != "none":
        raise ValueError(
            f"--grad_checkpoint_keep {keep} is not supported with the attention_dropout of {dropout} in "
            f"{type(model).__name__}: recomputation would draw other random numbers. Use --grad_checkpoint_keep none."
        )
    context: dict[str, Any] = {}
    if saved_ops := SAVED_OPS[keep]:
        policy_fn = partial(_choose_policy, saved_ops)
        context["context_fn"] = partial(create_selective_checkpoint_contexts, policy_fn)
    layers = find_transformer_layers(module)
    recomputed = {int(i / ratio) for i in range(len(layers))} if ratio else set()
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i in recomputed
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **context)
    for layer in module.modules():
        if isinstance(layer, LoraLinear):
            layer.is_in_place = keep != "matmul"  # saved outputs of `addmm` must not be modified


def get_recomputed_layer_share(module: nn.Module) -> float:
    """Return the share of recomputed layers, 0 for a module without layers."""
    layers = find_transformer_layers(module)
    return sum(layer.gradient_checkpointing for layer in layers) / max(1, len(layers))


def _choose_policy(saved_ops: str, context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if re.search(saved_ops, str(operator)) else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(module: nn.Module) -> None:
    """Compile the layers of a vision encoder or LLM.

    Inputs may have any size; only a single tile is compiled apart. Neither the lengths nor the number of documents
    lead to another compilation. The vision encoder checkpoints its layers from outside, so each layer is compiled.
    Layers of transformers checkpoint themselves: compiled together with the checkpoint, their recomputation would draw
    other dropout masks. Their attention, norms and MLP are compiled instead.
    """
    # torch runs a function uncompiled after 8 compilations. All layers share one: with and without adapters, with
    # inputs that require grad or not, with one tile or several, in training and evaluation.
    torch._dynamo.config.cache_size_limit = 64
    for layer in find_transformer_layers(module):
        for child in [layer] if isinstance(layer, InternVisionEncoderLayer) else layer.children():
            child.compile(dynamic=True)
