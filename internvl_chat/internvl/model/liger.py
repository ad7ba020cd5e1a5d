"""Liger's Triton kernels in the language model: RMS norms, SwiGLU and rotary embeddings, for `--use_liger`.

Called by `train/build.py` on a loaded model. The loss stays `token_loss`, which never makes whole logits either.
"""

import torch

from .internvl_chat import InternVLChatModel
from .lora import plain


def use_liger_kernels(model: InternVLChatModel):
    """Lets the language model of this chat model compute with Liger's kernels.

    Raises:
        ValueError: liger-kernel is not installed, there is no CUDA device, or Liger does not know the language model.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(f"--use_liger True needs the package liger-kernel: {error}.") from error
    if not torch.cuda.is_available():
        raise ValueError("--use_liger True needs a CUDA device: Liger's kernels are written in Triton.")
    llm = plain(model.language_model)
    if llm.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"--use_liger True: Liger has no kernels for language models of type {llm.config.model_type}.")
    _apply_liger_kernel_to_instance(model=llm, cross_entropy=False, fused_linear_cross_entropy=False)
