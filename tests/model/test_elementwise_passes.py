"""Norms, layer scale and rotary embedding pass over memory as few times as torch allows, and keep their numbers."""

import re

import pytest
import torch
from helpers.operator_counter import OperatorCounter
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS
from torch import nn
from torch._subclasses import FakeTensorMode

from internvl.model.activation_checkpointing import SAVED_OPS
from internvl.model.internlm2.modeling_internlm2 import InternLM2Attention, InternLM2Config, InternLM2RMSNorm
from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig
from internvl.model.internvl_chat.modeling_intern_vit import InternRMSNorm, InternVisionEncoderLayer, add_layer_scale

HAS_FUSED_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")  # from torch 2.9 on
NORMS = [InternRMSNorm, InternLM2RMSNorm]


def compute_expected_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@pytest.mark.parametrize("norm_class", NORMS)
def test_rms_norm_equals_its_formula(norm_class):
    """In float32, and within a unit in the last place in bfloat16: torch's kernel rounds once."""
    torch.manual_seed(0)
    norm, x = norm_class(320, eps=1e-6), 9 * torch.randn(64, 320)
    norm.weight.data += 0.3 * torch.randn(320)
    torch.testing.assert_close(norm(x), compute_expected_norm(x, norm.weight), rtol=1e-6, atol=1e-6)
    norm, x = norm.bfloat16(), x.bfloat16()
    expected = compute_expected_norm(x.double(), norm.weight.double())
    unit = torch.exp2(torch.floor(torch.log2(expected.abs())) - 7)
    assert ((norm(x) - expected).abs() / unit).max() <= (0.5 if HAS_FUSED_RMS_NORM else 1.5)


@pytest.mark.skipif(not HAS_FUSED_RMS_NORM, reason="torch has the kernel from 2.9 on")
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm_class", NORMS)
def test_rms_norm_is_one_kernel_on_cuda(norm_class, weight_dtype):
    with FakeTensorMode(), torch.device("cuda"):
        norm = norm_class(32)
        norm.weight = nn.Parameter(torch.empty(32, dtype=weight_dtype))
        with torch.no_grad(), OperatorCounter() as counter:
            output = norm(torch.empty(2, 32, device="cuda", dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    names = {name for name in counter.calls if not name.startswith("prim::")}
    assert names - {"_to_copy", "empty"} == {"_fused_rms_norm"}  # a copy of the weight only


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_scale_equals_its_formula(is_frozen, dtype):
    """bfloat16 stands for autocast: the residual is float32."""
    torch.manual_seed(0)
    residual, x = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8).to(dtype).requires_grad_()
    scale = nn.Parameter(torch.randn(8), requires_grad=not is_frozen)
    inputs = [residual, x] if is_frozen else [residual, x, scale]
    output, expected = add_layer_scale(residual, x, scale), residual + x * scale
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    gradient = torch.randn(2, 5, 8)
    for actual, reference in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (output, expected)), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-6)


def test_elementwise_operators_of_a_vision_layer():
    layer = InternVisionEncoderLayer(InternVisionConfig(**TINY_VITS["300M"]), 0.0).requires_grad_(False)
    x = torch.randn(2, 17, 24, requires_grad=True)
    with OperatorCounter() as counter:
        layer(x)
    elementwise = ("native_layer_norm", "addcmul", "gelu", "add", "mul", "add_", "mul_", "clone", "cat", "_to_copy")
    counts = {name: counter.calls[name] for name in elementwise if counter.calls[name]}
    assert counts == {"native_layer_norm": 2, "addcmul": 2, "gelu": 1}


def test_the_gradient_of_wqkv_is_made_at_once():
    """The backward pass of a slice or an index would make a tensor of the size of all queries, keys and values."""
    config = InternLM2Config(**TINY_LLM | TINY_LLMS["internlm2"])
    config._attn_implementation = "sdpa"
    attention = InternLM2Attention(config, 0)
    x, cos, sin = torch.randn(1, 6, 32, requires_grad=True), torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    output, _ = attention(x, (cos, sin))
    with OperatorCounter() as counter:
        output.sum().backward()
    assert counter.calls["select_backward"] == 0
    assert counter.calls["slice_backward"] == 4  # the halves of queries and keys


@pytest.mark.parametrize(
    ("operator", "is_attention"),
    [
        ("aten._scaled_dot_product_flash_attention.default", True),
        ("aten._scaled_dot_product_cudnn_attention.default", True),
        ("aten._scaled_dot_product_flash_attention_backward.default", False),
        ("flash_attn._flash_attn_varlen_forward.default", True),
        ("flash_attn._flash_attn_varlen_backward.default", False),
        ("flash_attn_3.fwd.default", True),
        ("flash_attn_3.bwd.default", False),
        ("torch_attn._varlen_attn.default", True),
        ("torch_attn._varlen_attn_backward.default", False),
    ],
)
def test_operators_of_attention_are_recognized(operator, is_attention):
    for keep in ("attention", "matmul"):
        assert bool(re.search(SAVED_OPS[keep], operator)) == is_attention
