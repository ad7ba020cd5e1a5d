"""Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989), for `--use_liger`.

RMS norms, SwiGLU and rotary embeddings in language models that Liger knows, and the cross entropy in any whose logits
are what comes out of its head. Called by `train/build.py` on a loaded model.
"""

import logging

import torch
from torch import nn

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import unwrap_peft
from internvl.model.token_loss import scale_logits

logger = logging.getLogger(__name__)


def use_liger_kernels(model: InternVLChatModel) -> None:
    """Lets the language model of this chat model, and its loss, be computed with Liger's kernels.

    Raises:
        ValueError: liger-kernel is not installed, or there is nothing that its kernels could run on.
    """
    try:
        import triton
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(f"--use_liger True needs the package liger-kernel: {error}.") from error
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        raise ValueError("--use_liger True needs a CUDA device: Liger's kernels are written in Triton.")
    llm = unwrap_peft(model.language_model)
    if llm.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        experts = hasattr(llm.config, "num_experts_per_tok")  # stay as they are: their adapters are made for these
        own_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        _apply_liger_kernel_to_instance(model=llm, swiglu=not experts, **own_loss)
    else:
        logger.info("Liger has no layers for %s: the loss alone is computed by its kernels", llm.config.model_type)
    probe = torch.empty(0)
    if scale_logits(llm, probe) is probe:
        llm.get_output_embeddings().sweep = sweep


def sweep(
    head: nn.Linear,
    states: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    through_states: bool,
    trained: list[nn.Parameter],
) -> tuple:
    """What `token_loss._sweep` returns, in about `count` chunks; logits and their gradients share memory and type."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    vocabulary, width = head.weight.shape
    with torch.no_grad():
        losses, _, _, _, in_states, in_weight, in_bias = fused_linear_cross_entropy_forward(
            states,
            head.weight,
            targets,
            bias=head.bias,
            reduction="none",
            token_grad_output=weights if trained else None,
            compute_gradients=through_states or bool(trained),
            weight_requires_grad=bool(trained),
            accum_dtype=torch.float32,
            chunk_mem_const=-(-vocabulary // (count * width)),
        )
        if not trained:
            in_states *= weights[:, None]  # in float32: Liger rounds weights to the type of the logits
    found = {id(head.weight): in_weight, id(head.bias): in_bias}
    in_states = in_states if through_states else states[:0]
    return (losses * weights).sum(), in_states, *(found[id(weight)] for weight in trained)
