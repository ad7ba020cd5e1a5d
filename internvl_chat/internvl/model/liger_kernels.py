"""Liger's Triton kernels for `--use_liger` (Hsu et al. 2024, arXiv 2410.10989).

They replace RMS norms, SwiGLU and rotary embeddings in InternLM2 and in LLMs that Liger supports, RMS norms in the
vision encoder, and the cross entropy in any LLM whose head computes the logits directly, without scaling.
"""

import logging
import os
import sys
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import unwrap_peft
from internvl.model.token_loss import scale_logits
from internvl.versions import require_package

logger = logging.getLogger(__name__)


def use_liger_kernels(model: InternVLChatModel) -> None:
    """Replace layers of both parts, and the loss, by Liger's kernels.

    Raises:
        ValueError: liger-kernel is not installed or too old, or there is no device that can run its kernels.
    """
    require_package("liger-kernel", "--use_liger True")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--use_liger True requires a CUDA device: Liger's kernels are written in Triton.")
    # Triton 3.2, of torch 2.6, cannot even be imported without a device.
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    from internvl.model.liger_layers import LIGER_LAYERS

    for module in model.modules():
        module.__class__ = LIGER_LAYERS.get(type(module), type(module))
    llm = unwrap_peft(model.language_model)
    if llm.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        # Modules of experts are not replaced: LoRA adapts their parameters.
        has_experts = hasattr(llm.config, "num_experts_per_tok")
        # The loss is `compute_liger_loss` below. Liger would compute it in the LLM's `forward`, but the chat model
        # calls decoder and head apart.
        no_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        _apply_liger_kernel_to_instance(model=llm, swiglu=not has_experts, **no_loss)
        use_out_of_place_rotary(llm)
    elif not any(type(module) in LIGER_LAYERS.values() for module in llm.modules()):
        logger.info("Liger kernels: %s is not supported, only the loss uses them", llm.config.model_type)
    probe = torch.empty(0)
    if scale_logits(llm, probe) is probe:  # this LLM does not scale its logits, as Liger's loss assumes
        llm.get_output_embeddings().fused_loss_fn = compute_liger_loss


def use_out_of_place_rotary(llm: PreTrainedModel) -> None:
    """Make Liger's rotary embedding of an LLM leave its inputs unchanged.

    It rotates queries and keys in place. `--grad_checkpoint_keep matmul` saves them as outputs of linear layers, so
    the recomputation would rotate them twice.
    """
    names = vars(sys.modules[type(llm).__module__])  # Liger replaces the function for all LLMs of this type
    rotary_fn = names.get("apply_rotary_pos_emb")
    if getattr(rotary_fn, "__module__", "").startswith("liger_kernel."):
        names["apply_rotary_pos_emb"] = partial(_rotate_copies, rotary_fn)


def _rotate_copies(rotary_fn, query: torch.Tensor, key: torch.Tensor, *args, **kwargs):
    return rotary_fn(query.clone(), key.clone(), *args, **kwargs)


def compute_liger_loss(
    head: nn.Linear,
    states: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    num_chunks: int,
    needs_states_grad: bool,
    head_weights: list[nn.Parameter],
) -> tuple:
    """Compute the result of `token_loss.compute_loss_and_gradients` by Liger.

    states (n, C), targets (n,), weights (n,), in about `num_chunks` chunks. Liger keeps the gradients of logits in the
    memory and dtype of the logits.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    vocab_size, hidden_size = head.weight.shape
    with torch.no_grad():
        losses, _, _, _, states_grad, weight_grad, bias_grad = fused_linear_cross_entropy_forward(
            states,
            head.weight,
            targets,
            bias=head.bias,
            reduction="none",
            token_grad_output=weights if head_weights else None,
            compute_gradients=needs_states_grad or bool(head_weights),
            weight_requires_grad=bool(head_weights),
            accum_dtype=torch.float32,
            # Liger splits n tokens into about vocab_size / (hidden_size * chunk_mem_const) chunks.
            chunk_mem_const=-(-vocab_size // (num_chunks * hidden_size)),
        )
        if not head_weights:
            states_grad *= weights[:, None]  # in float32; Liger would round the weights to the dtype of the logits
    gradients = {id(head.weight): weight_grad, id(head.bias): bias_grad}
    states_grad = states_grad if needs_states_grad else states[:0]
    return (losses * weights).sum(), states_grad, *(gradients[id(weight)] for weight in head_weights)
