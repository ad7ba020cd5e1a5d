"""The loss found chunk by chunk, gradients and all, is that of the full logits: of every language model and head."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import LLM, LLMS, VITS
from model.test_architectures import FAMILIES
from torch import nn

from internvl.model import token_loss as module
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.documents import REDUCTIONS, document_weights
from internvl.model.lora import unwrap_peft
from internvl.model.token_loss import compute_logits, token_loss

# Those of InternVL, and one of each thing a head may have: a bias, each scale of LOGIT_SCALES.
MORE = ("CohereForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM", "PhiForCausalLM")
KINDS = LLMS | {name: {"architectures": [name], **FAMILIES[name]} for name in MORE}
IDS = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat([torch.arange(7), torch.arange(17)]).expand(2, -1)
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)


def adapt(model: InternVLChatModel):
    head = model.get_output_embeddings()
    name = next(name for name, part in unwrap_peft(model.language_model).named_modules() if part is head)
    model.wrap_llm_lora(r=4, lora_alpha=8, lora_dropout=0.0, targets=[name])


def tie(model: InternVLChatModel):
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


# What is done to a model, whose head is its own at first and trains -> what of the head trains.
HEADS = {
    "trained": (lambda model: None, {"weight", "bias"}),
    "tied": (tie, {"weight", "bias"}),
    "frozen": (lambda model: model.get_output_embeddings().requires_grad_(False), set()),
    "adapted": (adapt, {"lora_A.default.weight", "lora_B.default.weight"}),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Of 3 tokens of the tiny vocabulary."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * LLM["vocab_size"])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_full_logits(kind, head, small_chunks):
    prepare, trained = HEADS[head]
    model = random_model(kind, prepare)
    parts = dict(model.get_output_embeddings().named_parameters())
    assert {name for name, weight in parts.items() if weight.requires_grad} == trained & parts.keys()
    for reduction in REDUCTIONS:
        model.loss_reduction = reduction
        whole = of_full_logits(model, reduction)
        model.train().zero_grad()
        result = model(input_ids=IDS, position_ids=POSITIONS, labels=LABELS)
        assert result.logits is None
        result.loss.backward()
        assert_equal((result.loss, gradients(model.language_model)), whole)


def random_model(kind: str, *changes: Callable) -> InternVLChatModel:
    """A chat model, changed, whose language model has the same weights each time, adapters included."""
    torch.manual_seed(0)
    model = InternVLChatModel(InternVLChatConfig(VITS["300M"], LLM | KINDS[kind], template="internvl2_5"))
    for change in changes:
        change(model)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def of_full_logits(model: InternVLChatModel, reduction: str):
    """The loss by its formula."""
    model.eval().zero_grad()
    logits = model(input_ids=IDS, position_ids=POSITIONS).logits[:, :-1]
    counted = (LABELS[:, 1:] != -100) & (POSITIONS[:, 1:] != 0)
    weights = document_weights(LABELS, POSITIONS, reduction)[:, 1:][counted]
    losses = F.cross_entropy(logits[counted], LABELS[:, 1:][counted], reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    return loss, gradients(model.language_model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: tuple, expected: tuple, tolerance: float = 1e-6):
    """Of the largest gradient of a weight."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        difference, size = (found[1][name] - gradient).abs().max(), gradient.abs().max()
        assert difference <= tolerance * max(1, size), (name, difference, size)


class Watched(nn.Linear):
    """A head that notes what its forward sees."""

    def forward(self, states):
        self.seen = [*getattr(self, "seen", []), (len(states), torch.is_grad_enabled())]
        return super().forward(states)


def watched(tokens: int, dtype=torch.float32, vocabulary: int = 50):
    torch.manual_seed(0)
    head, states = Watched(8, vocabulary).to(dtype), torch.randn(1, tokens + 5, 8, dtype=dtype, requires_grad=True)
    labels = torch.full((1, tokens + 5), -100)
    labels[0, 1 : tokens + 1] = torch.randint(vocabulary, (tokens,))
    return head, states, labels


@pytest.mark.parametrize("trained", [0, 1, 3, 25])
@pytest.mark.parametrize("frozen", [True, False])
def test_each_token_passes_the_head_once_in_chunks_and_its_hooks_run_once(trained, frozen, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 50)
    head, states, labels = watched(trained)
    head.requires_grad_(not frozen)
    calls = []
    head.register_forward_hook(lambda *args: calls.append("forward"))
    loss = token_loss(states, head, labels)
    loss.backward()
    lengths = [length for length, _ in head.seen]
    assert sum(lengths) == trained and max(lengths) <= 3 and calls == ["forward"]
    assert states.grad.abs().sum(-1).bool().sum() == trained
    assert trained or loss.item() == 0
    assert frozen or head.weight.grad.any() == (trained > 0)
    assert not head._forward_pre_hooks and len(head._forward_hooks) == 1, "hooks were left behind"


def test_without_gradients_no_graph_is_made(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 50)
    head, states, labels = watched(25)
    expected = token_loss(states, head, labels)
    head.seen = []
    with torch.no_grad():
        loss = token_loss(states, head, labels)
    assert loss == expected and not loss.requires_grad and not any(graph for _, graph in head.seen)


def test_only_the_head_may_train():
    head, states, labels = watched(25)
    token_loss(states, head, labels).backward()
    alone = copy.deepcopy(head)
    alone.zero_grad()
    token_loss(states.detach(), alone, labels).backward()
    assert torch.equal(alone.weight.grad, head.weight.grad) and torch.equal(alone.bias.grad, head.bias.grad)


def test_what_the_loss_is_multiplied_with_and_a_second_backward_count():
    """As gradient accumulation does it."""
    head, states, labels = watched(25)
    loss = token_loss(states, head, labels)
    (0.25 * loss).backward(retain_graph=True)
    quarter = states.grad.clone(), head.weight.grad.clone()
    (0.75 * loss).backward()
    for sum, part in zip((states.grad, head.weight.grad), quarter, strict=True):
        torch.testing.assert_close(sum, 4 * part)


def test_bfloat16_weights_sum_their_gradient_over_chunks_in_float32(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 50)  # of one token: summed in bfloat16, the result would be off
    head, states, labels = watched(2000, torch.bfloat16)
    token_loss(states, head, labels).backward()
    exact = copy.deepcopy(head).double()
    exact.zero_grad()
    token_loss(states.detach().double(), exact, labels).backward()
    assert head.weight.grad.dtype == torch.bfloat16
    error = (head.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    in_bfloat16 = torch.zeros_like(head.weight)
    for token in range(2000):
        one = copy.deepcopy(head)
        one.zero_grad()
        token_loss(states[:, token : token + 2].detach(), one, labels[:, token : token + 2]).backward()
        in_bfloat16 += one.weight.grad / 2000
    worse = (in_bfloat16.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 0.01 < worse


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_computes_as_it_does_on_full_logits(frozen, monkeypatch):
    """Weights of float32, products in bfloat16, the loss in float32."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 50)
    head, states, labels = watched(25)
    head.requires_grad_(not frozen)
    with torch.autocast("cpu", torch.bfloat16):
        token_loss(states, head, labels).backward()
    found = states.grad.clone(), gradients(head)
    states.grad = None
    head.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(states[:, :-1])
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits[0].float(), labels[0, 1:]).backward()
    torch.testing.assert_close(found[0], states.grad, rtol=1e-2, atol=1e-2 * states.grad.abs().max().item())
    assert found[1].keys() == gradients(head).keys() and len(found[1]) == (0 if frozen else 2)
    for name, gradient in gradients(head).items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


def test_logits_are_scaled_as_the_language_model_does_it():
    """So that the table of models above is not empty of scales."""
    for name in MORE[:3]:
        llm = InternVLChatModel(InternVLChatConfig(VITS["300M"], LLM | KINDS[name], template="internvl2_5"))
        llm = llm.language_model
        states = torch.randn(5, LLM["hidden_size"])
        assert not torch.equal(compute_logits(llm, states), llm.get_output_embeddings()(states)), name
