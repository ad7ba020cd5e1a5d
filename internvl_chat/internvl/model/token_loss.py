"""Cross entropy over trained tokens only: decoder states -> language model head -> loss.

A vocabulary is large and most tokens of a batch are not trained on (prompts, image tokens, padding). Only the states of
trained tokens go through the head, in chunks, and each chunk leaves its loss and its gradients behind: the full logits
never exist, and nothing is computed again in the backward pass (Wijmans et al. 2024, arXiv 2411.09009; Hsu et al. 2024,
arXiv 2410.10989).
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from internvl.model.internvl_chat.documents import loss_positions

# The float32 logits of a chunk are at most this large; about twice as much is in use at a time.
CHUNK_BYTES = 2**28


# What some families do to their logits after the head: (start of the model type, field of the config, function).
LOGIT_SCALES = [
    ("cohere", "logit_scale", torch.mul),
    ("granite", "logits_scaling", torch.div),
    ("hyperclovax", "logits_scaling", torch.mul),
    ("falcon_h1", "lm_head_multiplier", torch.mul),
    ("gemma", "final_logit_softcapping", lambda logits, cap: cap * torch.tanh(logits / cap)),
]


def keep_logits(logits: torch.Tensor) -> torch.Tensor:
    return logits


def scale_logits(llm: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """What comes out of the head -> the logits of this language model, of the same shape."""
    for family, field, function in LOGIT_SCALES:
        if llm.config.model_type.startswith(family) and (value := getattr(llm.config, field, None)):
            logits = function(logits, value)
    return logits


def compute_logits(llm: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Decoder states (..., C) -> logits (..., V), as the language model computes them itself."""
    return scale_logits(llm, llm.get_output_embeddings()(states))


def balance_loss(llm: PreTrainedModel, router_logits: tuple, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """What a mixture of experts adds to its loss for tokens spread unevenly, times its `router_aux_loss_coef`."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(router_logits, llm.num_experts, llm.num_experts_per_tok, attention_mask)
    return llm.router_aux_loss_coef * loss


def token_loss(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    loss_weight=None,
    average_weight_over_ranks: bool = False,
    scale: Callable[[torch.Tensor], torch.Tensor] = keep_logits,
) -> torch.Tensor:
    """Weighted mean cross entropy, a float32 scalar; exactly 0, with a graph, when there is nothing to train on.

    Args:
        hidden_states: (B, L, C) of the decoder. The full logits (B, L, V) may stand in, with `nn.Identity()` as head.
        head: module, states (n, C) -> (n, V); called as such once, and chunk by chunk through its `forward`.
        labels: (B, L), -100 where nothing is trained. position_ids: (B, L), 0 where a document begins.
        loss_weight: (B, L) tensor or nested list, a weight for each label; default 1 each.
        average_weight_over_ranks: divide by the mean over all ranks of the summed weights instead of this rank's sum.
        scale: what becomes of the head's output before it is logits (`scale_logits`).
    """
    trained = loss_positions(labels, position_ids)
    states, targets = hidden_states[:, :-1][trained], labels[:, 1:][trained]
    if loss_weight is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    else:
        loss_weight = torch.as_tensor(loss_weight, dtype=torch.float32, device=labels.device)
        weights = loss_weight[:, 1:][trained]

    total = _weighted_sum(head, scale, states, targets, weights)
    normalizer = weights.sum()
    if average_weight_over_ranks:
        dist.all_reduce(normalizer)
        normalizer = normalizer / dist.get_world_size()
    return total / torch.where(normalizer == 0, 1.0, normalizer)


def target_log_probs(
    head: nn.Module, scale: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each of n targets, (n,) float32, for losses that are no sum with weights known beforehand.

    How much a gradient counts is known in the backward pass alone: chunks are computed again there.
    """

    def of_chunk(states, targets):
        return -F.cross_entropy(scale(head.forward(states)).float(), targets, reduction="none")

    def of_chunks(states, count):
        chunks = zip(states.tensor_split(count), targets.tensor_split(count), strict=True)
        return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])

    return _in_one_call(head, states, of_chunks)


def _in_one_call(head: nn.Module, states: torch.Tensor, work: Callable[[torch.Tensor, int], torch.Tensor | tuple]):
    """What `work(states, number of chunks)` returns, called within one call of `head`; there, call `head.forward`.

    So the hooks of the head run once, whatever the number of chunks, which may differ between ranks: under ZeRO-3 they
    gather its weight before the call and before its backward pass, and let go of it afterwards.
    """
    inside = []

    def enter(module, args):
        inside.append(args[0])  # after DeepSpeed's hook, which puts a node of its own into the graph
        return args[0][:0]

    def leave(module, args, no_logits):
        states = inside.pop()
        return work(states, _count_chunks(head, states, no_logits.shape[-1]))

    hooks = head.register_forward_pre_hook(enter), head.register_forward_hook(leave, prepend=True)
    try:
        return head(states)
    finally:
        for hook in hooks:
            hook.remove()


def _count_chunks(head: nn.Module, states: torch.Tensor, vocabulary: int) -> int:
    count = max(1, -(-len(states) * vocabulary * 4 // CHUNK_BYTES))
    if _is_gathered_in_parts(head):  # whose hooks run for each chunk: on all ranks equally often
        highest = torch.tensor(count, device=states.device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        count = int(highest)
    return count


def _is_gathered_in_parts(head: nn.Module) -> bool:
    """Whether this is an adapted head under ZeRO-3."""
    return any(hasattr(weight, "ds_id") for child in head.children() for weight in child.parameters())


def _weighted_sum(
    head: nn.Module, scale: Callable, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum of weight times cross entropy over states (n, C) and targets (n,), a float32 scalar."""
    if _is_gathered_in_parts(head):  # and only the parts' hooks in the backward pass let their weights have gradients
        return -(target_log_probs(head, scale, states, targets) * weights).sum()
    learning = torch.is_grad_enabled()
    trained = [weight for weight in head.parameters() if learning and weight.requires_grad]
    through_states = learning and states.requires_grad

    def sweep(states, count):
        if len(states) and hasattr(head, "sweep"):  # a kernel for it (`liger.py`)
            return head.sweep(head, states, targets, weights, count, through_states, trained)
        chunks = zip(*(whole.tensor_split(count) for whole in (states, targets, weights)), strict=True)
        return _sweep(lambda chunk: scale(head.forward(chunk)), chunks, through_states, trained)

    if trained:
        return _in_one_call(head, states, lambda states, count: _Swept.apply(sweep(states, count), states, *trained))
    with torch.no_grad():  # the backward pass needs no frozen head: let no hook gather it there
        swept = _in_one_call(head, states, sweep)
    return _Swept.apply(swept, states)


class _Swept(torch.autograd.Function):
    """Puts what `_sweep` found, a scalar and its gradients, into the graph."""

    @staticmethod
    def forward(ctx, swept: tuple, states: torch.Tensor, *trained: nn.Parameter) -> torch.Tensor:
        total, *gradients = swept
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, factor: torch.Tensor) -> tuple:
        of_states, *of_trained = (gradient * factor for gradient in ctx.saved_tensors)
        return None, of_states if ctx.needs_input_grad[1] else None, *of_trained


@torch.no_grad()
def _sweep(logits_of: Callable, chunks: Iterable, through_states: bool, trained: list[nn.Parameter]) -> tuple:
    """Sum of weighted losses, and its gradients in the states (empty unless `through_states`) and in trained weights.

    Gradients of weights are summed over chunks in float32.
    """
    total, in_states, in_trained = 0.0, [], []
    for states, *targets_and_weights in chunks:
        states = states.detach().requires_grad_(through_states)
        inputs = [*[states] * through_states, *trained]
        loss, gradients = _chunk(logits_of, states, *targets_and_weights, inputs)
        total = total + loss
        in_states += gradients[: len(inputs) - len(trained)]
        new = gradients[len(inputs) - len(trained) :]
        if in_trained:
            new = [sum.add_(gradient) for sum, gradient in zip(in_trained, new, strict=True)]
        in_trained = [gradient.float() for gradient in new]
    in_trained = [gradient.to(weight.dtype) for gradient, weight in zip(in_trained, trained, strict=True)]
    return total, torch.cat(in_states or [states[:0]]), *in_trained


def _chunk(
    logits_of: Callable, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Sum of weighted losses of one chunk, and its gradients in `inputs`."""
    with torch.set_grad_enabled(bool(inputs)):
        logits = logits_of(states)
    log_probs = logits.detach().log_softmax(-1, dtype=torch.float32)
    loss = -(log_probs.gather(1, targets[:, None])[:, 0] * weights).sum()
    if not inputs:
        return loss, []
    # The gradient in the logits, in the memory of the log-probabilities: weight times (probability - 1 at the target).
    slopes = log_probs.exp_()
    slopes[torch.arange(len(targets), device=targets.device), targets] -= 1
    slopes *= weights[:, None]
    found = torch.autograd.grad(logits, inputs, slopes.to(logits.dtype), allow_unused=True)
    unused = torch.zeros_like  # an adapter that is switched off
    return loss, [unused(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]
