"""The token loss and its gradients equal those of the full logits.

Compared are all LLMs, with trainable, tied, frozen and adapted heads.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import TINY_LLM, TINY_LLMS, build_tiny_model
from helpers.token_loss_cases import (
    HEADS,
    INPUT_IDS,
    LABELS,
    POSITION_IDS,
    assert_same_loss_and_gradients,
    get_gradients,
)
from torch import nn

from internvl.model import token_loss
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.documents import LOSS_REDUCTIONS, compute_label_weights
from internvl.model.token_loss import compute_logits, compute_token_loss, compute_token_losses

# Heads with logit scales, and one with a bias.
ARCHITECTURES_WITH_SCALES = ("CohereForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM")
LLM_KINDS = [*TINY_LLMS, *ARCHITECTURES_WITH_SCALES, "PhiForCausalLM"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Set the chunk size to 3 tokens of the tiny vocabulary."""
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * TINY_LLM["vocab_size"])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_loss_and_gradients_equal_those_of_the_full_logits(kind, head, small_chunks):
    change_head, trainable = HEADS[head]
    model = build_tiny_model(kind, change_head)
    parameters = dict(model.get_output_embeddings().named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == trainable & parameters.keys()
    for reduction in LOSS_REDUCTIONS:
        model.loss_reduction = reduction
        expected = compute_from_full_logits(model, reduction)
        model.train().zero_grad()
        output = model(input_ids=INPUT_IDS, position_ids=POSITION_IDS, labels=LABELS)
        assert output.logits is None
        output.loss.backward()
        assert_same_loss_and_gradients((output.loss, get_gradients(model.language_model)), expected)


def compute_from_full_logits(model: InternVLChatModel, reduction: str) -> tuple:
    """Compute the loss by its formula, and its gradients."""
    model.eval().zero_grad()
    logits = model(input_ids=INPUT_IDS, position_ids=POSITION_IDS).logits[:, :-1]
    has_loss = (LABELS[:, 1:] != -100) & (POSITION_IDS[:, 1:] != 0)
    weights = compute_label_weights(LABELS, POSITION_IDS, reduction)[:, 1:][has_loss]
    losses = F.cross_entropy(logits[has_loss], LABELS[:, 1:][has_loss], reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    return loss, get_gradients(model.language_model)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_losses_of_single_tokens_equal_those_of_the_full_logits(kind, head, small_chunks):
    model = build_tiny_model(kind, HEADS[head][0]).eval()
    model.loss_reduction = "square"  # has no effect
    batch = {"input_ids": INPUT_IDS, "position_ids": POSITION_IDS}
    losses, is_correct = model(**batch, labels=LABELS, per_token_loss=True)
    assert losses.dtype == torch.float32 and not losses.requires_grad
    logits = model(**batch).logits[:, :-1]
    has_loss = (LABELS[:, 1:] != -100) & (POSITION_IDS[:, 1:] != 0)
    logits, targets = logits[has_loss].detach(), LABELS[:, 1:][has_loss]
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(is_correct, logits.argmax(-1) == targets)


@pytest.mark.parametrize("num_tokens", [0, 1, 25])
def test_losses_of_single_tokens_come_from_one_call_of_the_head_in_chunks(num_tokens, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * 50)
    head, states, labels = make_inputs(num_tokens)
    hook_calls = []
    head.register_forward_hook(lambda *args: hook_calls.append("forward"))
    losses, is_correct = compute_token_losses(head, states[0, :num_tokens], labels[0, 1 : num_tokens + 1])
    assert losses.shape == is_correct.shape == (num_tokens,) and is_correct.dtype == torch.bool
    chunk_sizes = [size for size, _ in head.calls]
    assert sum(chunk_sizes) == num_tokens and max(chunk_sizes) <= 3 and hook_calls == ["forward"]
    assert not losses.requires_grad and not any(is_grad_enabled for _, is_grad_enabled in head.calls)


class RecordingHead(nn.Linear):
    """A head that records size and grad mode of its calls."""

    def forward(self, states):
        self.calls = [*getattr(self, "calls", []), (len(states), torch.is_grad_enabled())]
        return super().forward(states)


def make_inputs(num_loss_tokens: int, dtype=torch.float32, vocab_size: int = 50):
    """Make a head, states (1, L, 8) and labels (1, L)."""
    torch.manual_seed(0)
    length = num_loss_tokens + 5
    head = RecordingHead(8, vocab_size).to(dtype)
    states = torch.randn(1, length, 8, dtype=dtype, requires_grad=True)
    labels = torch.full((1, length), -100)
    labels[0, 1 : num_loss_tokens + 1] = torch.randint(vocab_size, (num_loss_tokens,))
    return head, states, labels


@pytest.mark.parametrize("num_loss_tokens", [0, 1, 3, 25])
@pytest.mark.parametrize("frozen", [True, False])
def test_each_loss_token_passes_the_head_once_and_its_hooks_run_once(num_loss_tokens, frozen, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * 50)  # 3 tokens a chunk
    head, states, labels = make_inputs(num_loss_tokens)
    head.requires_grad_(not frozen)
    hook_calls = []
    head.register_forward_hook(lambda *args: hook_calls.append("forward"))
    loss = compute_token_loss(states, head, labels)
    loss.backward()
    chunk_sizes = [size for size, _ in head.calls]
    assert sum(chunk_sizes) == num_loss_tokens and max(chunk_sizes) <= 3 and hook_calls == ["forward"]
    assert states.grad.abs().sum(-1).bool().sum() == num_loss_tokens
    assert num_loss_tokens or loss.item() == 0
    assert frozen or head.weight.grad.any() == (num_loss_tokens > 0)
    assert not head._forward_pre_hooks and len(head._forward_hooks) == 1, "temporary hooks must be removed"


def test_no_graph_is_built_without_gradients(monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * 50)
    head, states, labels = make_inputs(25)
    expected = compute_token_loss(states, head, labels)
    head.calls = []
    with torch.no_grad():
        loss = compute_token_loss(states, head, labels)
    assert loss == expected and not loss.requires_grad and not any(is_grad_enabled for _, is_grad_enabled in head.calls)


def test_the_head_alone_may_be_trainable():
    head, states, labels = make_inputs(25)
    compute_token_loss(states, head, labels).backward()
    alone = copy.deepcopy(head)
    alone.zero_grad()
    compute_token_loss(states.detach(), alone, labels).backward()
    assert torch.equal(alone.weight.grad, head.weight.grad) and torch.equal(alone.bias.grad, head.bias.grad)


def test_scaled_losses_and_repeated_backward_passes_accumulate():
    """Gradient accumulation scales the loss and adds gradients."""
    head, states, labels = make_inputs(25)
    loss = compute_token_loss(states, head, labels)
    (0.25 * loss).backward(retain_graph=True)
    quarter = states.grad.clone(), head.weight.grad.clone()
    (0.75 * loss).backward()
    for total, part in zip((states.grad, head.weight.grad), quarter, strict=True):
        torch.testing.assert_close(total, 4 * part)


def test_gradients_of_bfloat16_weights_are_summed_over_chunks_in_float32(monkeypatch):
    # Chunks of one token: a sum over chunks in bfloat16 would be inaccurate.
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 4 * 50)
    head, states, labels = make_inputs(2000, torch.bfloat16)
    compute_token_loss(states, head, labels).backward()
    exact = copy.deepcopy(head).double()
    exact.zero_grad()
    compute_token_loss(states.detach().double(), exact, labels).backward()
    assert head.weight.grad.dtype == torch.bfloat16
    error = (head.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    bfloat16_sum = torch.zeros_like(head.weight)
    for token in range(2000):
        one = copy.deepcopy(head)
        one.zero_grad()
        compute_token_loss(states[:, token : token + 2].detach(), one, labels[:, token : token + 2]).backward()
        bfloat16_sum += one.weight.grad / 2000
    bfloat16_error = (bfloat16_sum.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 0.01 < bfloat16_error


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_equals_autocast_of_full_logits(frozen, monkeypatch):
    """Weights in float32, products in bfloat16, the loss in float32."""
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 3 * 4 * 50)
    head, states, labels = make_inputs(25)
    head.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        compute_token_loss(states, head, labels).backward()
    states_grad, head_grads = states.grad.clone(), get_gradients(head)
    states.grad = None
    head.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(states[:, :-1])
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits[0].float(), labels[0, 1:]).backward()
    torch.testing.assert_close(states_grad, states.grad, rtol=1e-2, atol=1e-2 * states.grad.abs().max().item())
    assert head_grads.keys() == get_gradients(head).keys() and len(head_grads) == (0 if frozen else 2)
    for name, gradient in get_gradients(head).items():
        torch.testing.assert_close(head_grads[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


def test_the_llms_of_these_tests_scale_their_logits():
    for name in ARCHITECTURES_WITH_SCALES:
        llm = build_tiny_model(name).language_model
        states = torch.randn(5, TINY_LLM["hidden_size"])
        assert not torch.equal(compute_logits(llm, states), llm.get_output_embeddings()(states)), name
