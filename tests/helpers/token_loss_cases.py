"""Batches, heads and comparisons for tests of the token loss."""

import pytest
import torch
from torch import nn

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import unwrap_peft

# Two rows of two documents, 7 + 17 tokens; 40 % of the labels are ignored.
INPUT_IDS = torch.randint(3, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
POSITION_IDS = torch.cat([torch.arange(7), torch.arange(17)]).expand(2, -1)
LABELS = INPUT_IDS.masked_fill(torch.rand(INPUT_IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4, -100)


def add_head_lora(model: InternVLChatModel) -> None:
    head = model.get_output_embeddings()
    name = next(name for name, module in unwrap_peft(model.language_model).named_modules() if module is head)
    model.wrap_llm_lora(r=4, lora_alpha=8, lora_dropout=0.0, targets=[name])


def tie_head(model: InternVLChatModel) -> None:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


# State of the head -> (function that changes a model with a trainable head, trainable parameters of the head).
HEADS = {
    "trained": (lambda model: None, {"weight", "bias"}),
    "tied": (tie_head, {"weight", "bias"}),
    "frozen": (lambda model: model.get_output_embeddings().requires_grad_(False), set()),
    "adapted": (add_head_lora, {"lora_A.default.weight", "lora_B.default.weight"}),
}


def get_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(actual: tuple, expected: tuple, tolerance: float = 1e-6) -> None:
    """Compare (loss, gradients by name).

    The tolerance of a gradient is relative to its largest element.
    """
    assert actual[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        difference, size = (actual[1][name] - gradient).abs().max(), gradient.abs().max()
        assert difference <= tolerance * max(1, size), (name, difference, size)
