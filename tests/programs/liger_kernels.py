"""Tests of Liger's kernels, run by `test_liger.py`.

Without a GPU they run in Triton's interpreter, which the environment asks for (TRITON_INTERPRET=1).
"""

import os
from collections import Counter

import numpy as np
import pytest
import torch
import triton.language as tl
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS, build_tiny_model, randomize_weights
from helpers.token_loss_cases import (
    HEADS,
    INPUT_IDS,
    LABELS,
    POSITION_IDS,
    assert_same_loss_and_gradients,
    get_gradients,
)
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

from internvl.model import token_loss
from internvl.model.activation_checkpointing import apply_gradient_checkpointing
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.documents import LOSS_REDUCTIONS
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import unwrap_peft
from internvl.model.varlen_attention import use_varlen_attention

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if IS_INTERPRETED else pytest.mark.gpu
DEVICE, TOLERANCE = ("cpu", 1e-5) if IS_INTERPRETED else ("cuda", 1e-4)
CHANGES = {name: change_head for name, (change_head, _) in HEADS.items()}
CHANGES["adapters"] = lambda model: model.wrap_llm_lora(r=4, lora_alpha=8, lora_dropout=0.0)
# LLM, change, loss reductions
CASES = [*((kind, "trained", ["square"]) for kind in TINY_LLMS), ("qwen2", "adapters", ["square"])]
CASES += [("internlm2", change, list(LOSS_REDUCTIONS)) for change in HEADS]


@pytest.fixture(autouse=True)
def complete_interpreter(monkeypatch):
    """Add what Triton's interpreter lacks.

    That is float arguments as tensors, and `rsqrt` of CUDA's libdevice.
    """
    if not IS_INTERPRETED:
        return

    def convert(value, original_fn=interpreter._implicit_cvt):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return original_fn(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))


@pytest.mark.parametrize(("kind", "change", "reductions"), CASES, ids=str)
def test_losses_and_gradients_equal_those_without_liger(kind, change, reductions, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * TINY_LLM["vocab_size"])  # 3 tokens a chunk
    expected = compute_losses(build_tiny_model(kind, CHANGES[change]), reductions)
    model = build_tiny_model(kind, use_liger_kernels, CHANGES[change])
    assert hasattr(model.get_output_embeddings(), "fused_loss_fn") == (change != "adapted")
    assert "Liger" in str(unwrap_peft(model.language_model))
    for result, expected_result in zip(compute_losses(model, reductions), expected, strict=True):
        assert_same_loss_and_gradients(result, expected_result, TOLERANCE)


def compute_losses(model: InternVLChatModel, reductions: list[str]) -> list[tuple]:
    """Compute loss and gradients with each reduction, and the loss without gradients."""
    batch = {"input_ids": INPUT_IDS, "position_ids": POSITION_IDS, "labels": LABELS}
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    model.train().to(DEVICE)
    results = []
    for model.loss_reduction in reductions:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, get_gradients(model.language_model)))
    with torch.no_grad():
        return [*results, (model(**batch).loss, {})]


# -- both parts, with images, packed rows and gradient checkpointing ---------------------------------------------------

IMAGE_TOKEN_ID = 7
# model type -> classes that call Liger's kernels -> their number in 3 layers of the vision encoder and 2 of the LLM
VISION_LAYERS = {"LigerInternRMSNorm": 3 * 4}
REPLACED = {
    "internlm2": {"LigerInternLM2RMSNorm": 5, "LigerInternLM2MLP": 2, "LigerInternLM2Attention": 2},
    "qwen2": {"LigerRMSNorm": 5, "LigerSwiGLUMLP": 2},
}


def run_step(llm: str, *changes, ratio: float = 0, keep: str = "none", **llm_fields) -> tuple:
    """Return the model, and loss and gradients of adapters in both parts on a packed row."""
    torch.manual_seed(0)
    fields = TINY_LLM | TINY_LLMS[llm] | llm_fields
    model = InternVLChatModel(InternVLChatConfig(TINY_VITS["6B"], fields, template="internvl2_5", force_image_size=56))
    model.img_context_token_id = IMAGE_TOKEN_ID
    for change in changes:
        change(model)
    model.requires_grad_(False)
    model.wrap_backbone_lora(4, 8, 0.1)
    model.wrap_llm_lora(4, 8, 0.1)
    randomize_weights(model, 0.1)
    use_varlen_attention(model.language_model, packed=True)
    for module in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(module, ratio, keep)
    ids = INPUT_IDS[:1].clone()
    ids[0, 8:12] = IMAGE_TOKEN_ID
    tile = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "position_ids": POSITION_IDS[:1], "labels": LABELS[:1], "pixel_values": tile}
    torch.manual_seed(2)  # of dropout
    loss = model.train().to(DEVICE)(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
    loss.backward()
    return model, (loss, get_gradients(model))


@pytest.mark.parametrize(
    ("llm", "ratio", "keep"),
    [("internlm2", 0, "none"), ("internlm2", 1, "none"), *((llm, 1, "matmul") for llm in REPLACED)],
)
def test_adapters_on_packed_rows_have_the_same_gradients(llm, ratio, keep):
    """Liger rotates queries and keys in place; `--grad_checkpoint_keep matmul` saves what they are made of."""
    _, expected = run_step(llm)
    model, actual = run_step(llm, use_liger_kernels, ratio=ratio, keep=keep)
    assert_same_loss_and_gradients(actual, expected, TOLERANCE)
    names = Counter(module._get_name() for module in model.modules())
    assert {name: count for name, count in names.items() if "Liger" in name} == VISION_LAYERS | REPLACED[llm]


def test_internlm2_with_another_activation_keeps_it():
    results = [run_step("internlm2", *change, hidden_act="gelu")[1] for change in ([], [use_liger_kernels])]
    assert_same_loss_and_gradients(*results, TOLERANCE)
