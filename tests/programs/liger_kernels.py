"""Liger's kernels against the computation without them; `test_liger.py` runs it, in Triton's interpreter if need be."""

import numpy as np
import pytest
import torch
import triton.language as tl
from helpers.tiny_models import LLM, LLMS
from liger_kernel.ops import rms_norm
from model.test_token_loss import HEADS, IDS, LABELS, POSITIONS, assert_equal, gradients, random_model
from triton.runtime import interpreter

from internvl.model import token_loss
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.documents import REDUCTIONS
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import unwrap_peft

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [*((kind, "trained", ["square"]) for kind in LLMS), ("qwen2", "adapters", ["square"])]
CASES += [("internlm2", way, list(REDUCTIONS)) for way in HEADS]
WAYS = {name: prepare for name, (prepare, _) in HEADS.items()}
WAYS["adapters"] = lambda model: model.wrap_llm_lora(r=4, lora_alpha=8, lora_dropout=0.0)


@pytest.fixture(autouse=True)
def interpreter_without_gaps(monkeypatch):
    """Triton's leaves out that a float is a tensor to a kernel, and the functions of CUDA's libdevice."""
    if DEVICE == "cuda":
        return

    def converted(value, before=interpreter._implicit_cvt):
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return before(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))


@pytest.mark.parametrize(("kind", "way", "reductions"), CASES, ids=str)
def test_losses_and_gradients_are_those_without_liger(kind, way, reductions, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * LLM["vocab_size"])
    expected = outcomes(random_model(kind, WAYS[way]), reductions)
    model = random_model(kind, use_liger_kernels, WAYS[way])
    assert hasattr(model.get_output_embeddings(), "sweep") == (way != "adapted")
    assert ("Liger" in str(unwrap_peft(model.language_model))) == (not kind.startswith("internlm2"))
    for found, wanted in zip(outcomes(model, reductions), expected, strict=True):
        assert_equal(found, wanted, 1e-5)


def outcomes(model: InternVLChatModel, reductions: list[str]) -> list[tuple]:
    """The loss and its gradients for each way to weigh documents, and the loss without gradients."""
    batch = {"input_ids": IDS, "position_ids": POSITIONS, "labels": LABELS}
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    model.train().to(DEVICE)
    found = []
    for model.loss_reduction in reductions:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss, gradients(model.language_model)))
    with torch.no_grad():
        return [*found, (model(**batch).loss, {})]
