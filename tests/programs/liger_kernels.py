"""Tests of Liger's kernels, run by `test_liger.py`.

Without a GPU they run in Triton's interpreter.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from helpers.tiny_models import TINY_LLM, TINY_LLMS, build_tiny_model
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
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.documents import LOSS_REDUCTIONS
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import unwrap_peft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    if DEVICE == "cuda":
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
    assert ("Liger" in str(unwrap_peft(model.language_model))) == (not kind.startswith("internlm2"))
    for result, expected_result in zip(compute_losses(model, reductions), expected, strict=True):
        assert_same_loss_and_gradients(result, expected_result, 1e-5)


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
