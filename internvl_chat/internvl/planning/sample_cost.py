"""Cost of a sample in a training step, from FLOPs.

Epoch plans balance the load of ranks by it. The unit is the FLOPs of a forward pass: one for the forward pass, one for
gradients of inputs, one for gradients of weights, and one if activations are recomputed.
"""

import torch
from torch import nn

from internvl.metrics.model_flops import ModelFlops, count_model_flops
from internvl.model.activation_checkpointing import get_recomputed_layer_share
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.planning.epoch_plan import SampleCost


def compute_sample_cost(model: InternVLChatModel) -> SampleCost:
    """Compute the cost of a sample for this model.

    It depends on which parts are trainable, which have adapters, and which layers recompute their activations. FLOPs of
    adapters are not counted.
    """
    vision_passes = count_passes(model.vision_model)
    # Gradients always pass through the LLM: to the projector or the vision encoder, even if the LLM is frozen.
    llm_passes = max(count_passes(model.language_model), vision_passes, 2)
    return scale_to_training(count_model_flops(model, backward=False, adapters=False), vision_passes, llm_passes)


def compute_forward_cost(model: InternVLChatModel) -> SampleCost:
    """Compute the cost of a sample in an evaluation of its loss."""
    forward = count_model_flops(model, backward=False, adapters=False)
    cost = scale_to_training(forward, vision_passes=1, llm_passes=1)
    return cost._replace(per_loss_token=forward.per_loss_token)


def count_passes(part: nn.Module) -> float:
    """Count the FLOPs of a part per step, in forward passes."""
    trainable = [name for name, parameter in part.named_parameters() if parameter.requires_grad]
    if not trainable:
        return 1
    # Adapters need gradients of inputs, but none of the frozen weights.
    has_weight_gradients = any("lora_" not in name for name in trainable)
    return 1 + get_recomputed_layer_share(part) + 1 + has_weight_gradients


def scale_to_training(forward: ModelFlops, vision_passes: float, llm_passes: float) -> SampleCost:
    """Scale the FLOPs of a forward pass to a training step.

    Sliding windows are ignored: every layer attends to all tokens of a document.
    """
    return SampleCost(
        per_token=forward.per_token * llm_passes,
        per_loss_token=forward.per_loss_token * 2,  # forward, and gradients of inputs; the head is never recomputed
        per_tile=forward.per_tile * vision_passes,
        per_token_pair=sum(forward.per_token_pair.values()) / 2 * llm_passes,  # causal: half of the n^2 pairs
    )


def count_forward_flops(config: InternVLChatConfig) -> ModelFlops:
    """Count the FLOPs of a forward pass from a configuration, without weights."""
    return count_model_flops(build_model_without_weights(config), backward=False)


def build_model_without_weights(config: InternVLChatConfig) -> InternVLChatModel:
    with torch.device("meta"):
        return InternVLChatModel(config)
