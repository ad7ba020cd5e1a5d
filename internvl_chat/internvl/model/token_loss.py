"""Cross entropy over trained tokens only: decoder states -> language model head -> loss.

A vocabulary is large and most tokens of a batch are not trained on (prompts, image tokens, padding). Only the states of
trained tokens go through the head, in chunks whose logits are computed again in the backward pass, so that the full
logits never exist.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

IGNORE_INDEX = -100
# Not a size: under ZeRO-3 each call of the head gathers its weight from all ranks, so all must call it equally often.
CHUNKS = 8


# What some families do to their logits after the head: (start of the model type, field of the config, function).
LOGIT_SCALES = [
    ("cohere", "logit_scale", torch.mul),
    ("granite", "logits_scaling", torch.div),
    ("hyperclovax", "logits_scaling", torch.mul),
    ("falcon_h1", "lm_head_multiplier", torch.mul),
    ("gemma", "final_logit_softcapping", lambda logits, cap: cap * torch.tanh(logits / cap)),
]


def logits_of(llm: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Decoder states (..., C) -> logits (..., V), as the language model computes them itself."""
    logits = llm.get_output_embeddings()(states)
    for family, field, function in LOGIT_SCALES:
        if llm.config.model_type.startswith(family) and (value := getattr(llm.config, field, None)):
            logits = function(logits, value)
    return logits


def balance_loss(llm: PreTrainedModel, router_logits: tuple, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """What a mixture of experts adds to its loss for tokens spread unevenly, times its `router_aux_loss_coef`."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(router_logits, llm.num_experts, llm.num_experts_per_tok, attention_mask)
    return llm.router_aux_loss_coef * loss


def document_begins(position_ids: torch.Tensor) -> torch.Tensor:
    """Boolean (B, L): a document begins at every position 0, and with every row."""
    begins = position_ids == 0
    begins[:, 0] = True
    return begins


def document_bounds(position_ids: torch.Tensor) -> list[int]:
    """Where documents begin in B rows laid end to end, and the number of all tokens: (B, L) -> [0, ..., B L]."""
    return [*document_begins(position_ids).flatten().nonzero().flatten().tolist(), position_ids.numel()]


# --loss_reduction -> weight of each of the n trained tokens of a document.
REDUCTIONS = {
    "token": lambda n: n**0.0,
    "sample": lambda n: 1 / n,
    "square": lambda n: n**-0.5,
}


def document_weights(labels: torch.Tensor, position_ids: torch.Tensor, reduction: str) -> torch.Tensor:
    """Weight (B, L), float32, of each label by the number of labels of its document, which begins at position 0."""
    document = document_begins(position_ids).flatten().cumsum(0) - 1
    counted = (labels != IGNORE_INDEX).flatten().float()
    counts = torch.zeros_like(counted).scatter_add(0, document, counted)[document]
    return (REDUCTIONS[reduction](counts.clamp(min=1)) * counted).view_as(labels)


def trained_positions(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Boolean (B, L - 1): whether position i is trained to predict label i + 1 (never across two documents)."""
    trained = labels[:, 1:] != IGNORE_INDEX
    return trained if position_ids is None else trained & (position_ids[:, 1:] != 0)


def token_loss(
    hidden_states: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    loss_weight=None,
    average_weight_over_ranks: bool = False,
) -> torch.Tensor:
    """Weighted mean cross entropy, a float32 scalar; exactly 0, with a graph, when there is nothing to train on.

    Args:
        hidden_states: (B, L, C) of the decoder. The full logits (B, L, V) may stand in, with `nn.Identity()` as head.
        head: states (n, C) -> logits (n, V), calling the head as a module, so that hooks (ZeRO-3, LoRA) run.
        labels: (B, L), -100 where nothing is trained. position_ids: (B, L), 0 where a document begins.
        loss_weight: (B, L) tensor or nested list, a weight for each label; default 1 each.
        average_weight_over_ranks: divide by the mean over all ranks of the summed weights instead of this rank's sum.
    """
    trained = trained_positions(labels, position_ids)
    states, targets = hidden_states[:, :-1][trained], labels[:, 1:][trained]
    if loss_weight is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    else:
        loss_weight = torch.as_tensor(loss_weight, dtype=torch.float32, device=labels.device)
        weights = loss_weight[:, 1:][trained]

    total = states[:0].sum().float()  # a zero with a graph, for when no token is trained
    for chunk in zip(
        states.tensor_split(CHUNKS), targets.tensor_split(CHUNKS), weights.tensor_split(CHUNKS), strict=True
    ):
        total = total + checkpoint(_weighted_sum, head, *chunk, use_reentrant=False)

    normalizer = weights.sum()
    if average_weight_over_ranks:
        dist.all_reduce(normalizer)
        normalizer = normalizer / dist.get_world_size()
    return total / torch.where(normalizer == 0, 1.0, normalizer)


def _weighted_sum(head: Callable, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weight times cross entropy over states (n, C) and targets (n,)."""
    losses = F.cross_entropy(head(states).float(), targets, reduction="none")
    return (losses * weights).sum()
