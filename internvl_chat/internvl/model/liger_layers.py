"""InternLM2's and InternViT's layers on Liger's Triton kernels.

It requires the package liger-kernel. Parameters, names and results are those of the replaced classes.
"""

import torch
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from torch import nn
from transformers.activations import ACT2FN

from internvl.model.internlm2.modeling_internlm2 import InternLM2Attention, InternLM2MLP, InternLM2RMSNorm
from internvl.model.internvl_chat.modeling_intern_vit import InternRMSNorm


def compute_rms_norm(norm, x: torch.Tensor) -> torch.Tensor:
    """Compute `InternRMSNorm` or `InternLM2RMSNorm`; in bfloat16 it rounds as upstream does."""
    return LigerRMSNormFunction.apply(x, norm.weight, norm.variance_epsilon)


class LigerInternRMSNorm(InternRMSNorm):
    forward = compute_rms_norm


class LigerInternLM2RMSNorm(InternLM2RMSNorm):
    forward = compute_rms_norm


class LigerInternLM2MLP(InternLM2MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.act_fn) is not type(ACT2FN["silu"]):
            return super().forward(x)
        return self.w2(LigerSiLUMulFunction.apply(self.w1(x), self.w3(x)))


class LigerInternLM2Attention(InternLM2Attention):
    # In place, but not in the memory of `wqkv`'s output: the queries are a copy, and the keys, which are not
    # contiguous, are copied.
    apply_rotary_fn = staticmethod(liger_rotary_pos_emb)


# InternViT's other elementwise operators are one kernel each: layer norm, GELU, layer scale with the residual.
LIGER_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    InternRMSNorm: LigerInternRMSNorm,
    InternLM2RMSNorm: LigerInternLM2RMSNorm,
    InternLM2MLP: LigerInternLM2MLP,
    InternLM2Attention: LigerInternLM2Attention,
}
