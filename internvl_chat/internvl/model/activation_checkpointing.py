"""Which activations of a tower (vision encoder, language model) are computed again in the backward pass, not kept.

Set by `train/towers.py` once the model is frozen and wrapped. Checkpoints are never reentrant: adapters get gradients
although their input needs none, and dropout draws the same numbers again.
"""

import re
from functools import partial

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from internvl.model.internvl_chat.modeling_intern_vit import InternVisionEncoderLayer
from internvl.model.lora import unwrap_peft
from internvl.model.lora_linear import LoraLinear

_ATTENTION = r"scaled_dot_product_\w*attention\w*|flash_attn\w*forward"
# --checkpoint_keep -> the operators of torch whose outputs are kept in a layer that is computed again, by their names.
# Products of batches of matrices are not among them: these may be scores of attention, L x L. Nor are those of experts,
# which transformers adds their biases to in place.
SAVED_OPS = {
    "none": None,
    "attention": rf"\b_?({_ATTENTION})\b",
    "matmul": rf"\b_?({_ATTENTION}|mm|addmm)\b",
}


def transformer_layers(tower: nn.Module) -> list[nn.Module]:
    """The layers of a vision encoder or of a language model, wrapped or not, from the first to the last."""
    return [m for m in tower.modules() if isinstance(m, (InternVisionEncoderLayer, GradientCheckpointingLayer))]


def apply_gradient_checkpointing(tower: nn.Module, every: float = 1, keep: str = "none") -> None:
    """Lets each `every`-th layer of a tower, the first among them, compute its activations again; 1.25: four of five;
    0: none.

    Args:
        keep: a key of `SAVED_OPS`.

    Raises:
        ValueError: attention of this tower drops weights at random, and its outputs are to be kept: what is drawn after
            it would be other numbers the second time.
    """
    model = unwrap_peft(tower)
    dropout = getattr(model.config, "attention_dropout", 0)
    if every and dropout and keep != "none":
        raise ValueError(
            f"--checkpoint_keep {keep} does not go with the attention_dropout of {dropout} in {type(model).__name__}: "
            "random numbers would differ when activations are computed again."
        )
    policy = partial(_policy, SAVED_OPS[keep])
    context = {} if keep == "none" else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    layers = transformer_layers(tower)
    again = {int(number * every) for number in range(len(layers))} if every else set()
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number in again
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, **context)
    for module in tower.modules():
        if isinstance(module, LoraLinear):
            module.in_place = keep != "matmul"  # what is kept must stay as it was


def recomputed_layer_share(tower: nn.Module) -> float:
    """Share of a tower's layers that are computed again; 0 for a module without such layers."""
    layers = transformer_layers(tower)
    return sum(layer.gradient_checkpointing for layer in layers) / max(1, len(layers))


def _policy(kept: str, context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if re.search(kept, str(operator)) else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(tower: nn.Module) -> None:
    """Compiles the layers of a vision encoder, and of a language model the parts of its layers, for inputs of any size.

    Layers of transformers checkpoint themselves, and what is computed again must be what was compiled, or dropout would
    draw other numbers the second time: so it is their attention, norms and MLP that are compiled.
    """
    for layer in transformer_layers(tower):
        for module in [layer] if isinstance(layer, InternVisionEncoderLayer) else layer.children():
            module.compile(dynamic=True)
