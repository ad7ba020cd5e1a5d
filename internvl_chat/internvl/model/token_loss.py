"""Cross entropy over loss tokens only, without the full logits.

The vocabulary is large and most tokens of a batch have no loss (prompts, image tokens, padding). Only the hidden states
of loss tokens go through the LM head, in chunks. Each chunk yields its loss and the gradients at once: the full
logits (B, L, V) never exist, and nothing is recomputed in the backward pass (Wijmans et al. 2024, arXiv 2411.09009; Hsu
et al. 2024, arXiv 2410.10989).

Shapes: n loss tokens, C hidden size, V vocabulary size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from internvl.model.internvl_chat.documents import find_loss_indices, select_loss_tokens
from internvl.model.internvl_chat.zero3 import is_partitioned

# Maximum size of the float32 logits of a chunk; peak memory is about twice that.
CHUNK_BYTES = 2**28

# Scaling of logits after the head: (prefix of the model type, field of the configuration, function).
LOGIT_SCALES = [
    ("cohere", "logit_scale", torch.mul),
    ("granite", "logits_scaling", torch.div),
    ("hyperclovax", "logits_scaling", torch.mul),
    ("falcon_h1", "lm_head_multiplier", torch.mul),
    ("gemma", "final_logit_softcapping", lambda logits, cap: cap * torch.tanh(logits / cap)),
]


def scale_logits(llm: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """Scale the output of the head to the logits of this LLM."""
    for family, field, function in LOGIT_SCALES:
        if llm.config.model_type.startswith(family) and (value := getattr(llm.config, field, None)):
            logits = function(logits, value)
    return logits


def compute_logits(llm: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Compute logits (..., V) from hidden states (..., C)."""
    head: Any = llm.get_output_embeddings()
    return scale_logits(llm, head(states))


def compute_router_aux_loss(llm: Any, router_logits: tuple, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Compute the load balancing loss of experts, times its coefficient."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = load_balancing_loss_func(router_logits, llm.num_experts, llm.num_experts_per_tok, attention_mask)
    return llm.router_aux_loss_coef * loss


def compute_token_loss(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    loss_weight=None,
    average_weight_over_ranks: bool = False,
    scale_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    loss_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the weighted mean cross entropy, a float32 scalar.

    Without loss tokens it is exactly 0 and still has a graph: every rank can run its backward pass.

    Args:
        hidden_states: (B, L, C) of the decoder; or the full logits (B, L, V), with `nn.Identity()` as head.
        head: module, (n, C) -> (n, V). It is called once; the chunks go through its `forward`.
        labels: (B, L), -100 where there is no loss.
        position_ids: (B, L), 0 where a document begins.
        loss_weight: (B, L) tensor or nested list, a weight for each label; default: 1 each.
        average_weight_over_ranks: divide by the mean over ranks of the summed weights, not by this rank's sum.
        scale_fn: function from the output of the head to logits, see `scale_logits`; default: none.
        loss_indices: (n,) of `find_loss_indices`, if they are known already.
    """
    if loss_indices is None:
        loss_indices = find_loss_indices(labels, position_ids)
    states, targets = select_loss_tokens(hidden_states, labels, loss_indices)  # (n, C), (n,)
    if loss_weight is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    else:
        loss_weight = torch.as_tensor(loss_weight, dtype=torch.float32, device=labels.device)
        weights = loss_weight.flatten()[loss_indices + 1]

    total = _compute_weighted_loss_sum(head, scale_fn or nn.Identity(), states, targets, weights)
    normalizer = weights.sum()
    if average_weight_over_ranks:
        dist.all_reduce(normalizer)
        normalizer = normalizer / dist.get_world_size()
    return total / torch.where(normalizer == 0, 1.0, normalizer)


def compute_target_log_probs(
    head: nn.Module,
    scale_fn: Callable[[torch.Tensor], torch.Tensor] | None,
    states: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Compute the log-probability (n,), float32, of each target.

    states (n, C), targets (n,). This is for losses such as preference losses, which are not a weighted sum over tokens.
    Their gradients are known only in the backward pass, which recomputes the logits chunk by chunk.
    """
    scale_fn = scale_fn or nn.Identity()

    def compute_chunk(states, targets):
        return -F.cross_entropy(scale_fn(head.forward(states)).float(), targets, reduction="none")

    def compute_all_chunks(states, num_chunks):
        chunks = zip(states.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        return torch.cat([checkpoint(compute_chunk, *chunk, use_reentrant=False) for chunk in chunks])

    return _call_head_once(head, states, compute_all_chunks)


@torch.no_grad()
def compute_token_losses(
    head: nn.Module,
    states: torch.Tensor,
    targets: torch.Tensor,
    scale_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross entropy of each target, without gradients.

    states (n, C), targets (n,). This is for evaluation. As for the loss, the head is called once, on chunks.

    Returns:
        The losses, (n,) float32, and whether each target has the largest logit, (n,) bool.
    """
    scale_fn = scale_fn or nn.Identity()

    def compute_chunk(states, targets):
        logits = scale_fn(head.forward(states)).float()  # (m, V)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def compute_all_chunks(states, num_chunks):
        chunks = zip(states.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
        losses, is_correct = zip(*(compute_chunk(*chunk) for chunk in chunks), strict=True)
        return torch.cat(losses), torch.cat(is_correct)

    return _call_head_once(head, states, compute_all_chunks)


# -- one call of the head ----------------------------------------------------------------------------------------------


def _call_head_once(
    head: nn.Module, states: torch.Tensor, chunks_fn: Callable[[torch.Tensor, int], torch.Tensor | tuple]
):
    """Return `chunks_fn(states, num_chunks)`, run inside one call of `head`.

    The hooks of the head then run once, whatever the number of chunks, which may differ between ranks. Under ZeRO-3
    these hooks gather its weight before the call and before its backward pass, and release it afterwards. `chunks_fn`
    must use `head.forward`, which runs no hooks.
    """
    received_states = []

    def replace_input(module, args):
        received_states.append(args[0])  # runs after DeepSpeed's hook, which has added a node to the graph
        return args[0][:0]

    def replace_output(module, args, empty_logits):
        states = received_states.pop()
        return chunks_fn(states, _count_chunks(head, states, empty_logits.shape[-1]))

    hooks = head.register_forward_pre_hook(replace_input), head.register_forward_hook(replace_output, prepend=True)
    try:
        return head(states)
    finally:
        for hook in hooks:
            hook.remove()


def _count_chunks(head: nn.Module, states: torch.Tensor, vocab_size: int) -> int:
    num_chunks = max(1, -(-len(states) * vocab_size * 4 // CHUNK_BYTES))
    if _is_adapted_under_zero3(head):
        # ZeRO-3's hooks on its children gather weights for each chunk, so all ranks need the same number of chunks.
        maximum = torch.tensor(num_chunks, device=states.device)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        num_chunks = int(maximum)
    return num_chunks


def _is_adapted_under_zero3(head: nn.Module) -> bool:
    """Return whether the head has LoRA adapters and ZeRO-3 partitions its weights."""
    return any(is_partitioned(weight) for child in head.children() for weight in child.parameters())


# -- loss and gradients in one pass ------------------------------------------------------------------------------------


def _compute_weighted_loss_sum(
    head: nn.Module, scale_fn: Callable, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute the sum of weight times cross entropy, a float32 scalar.

    states (n, C), targets (n,), weights (n,).
    """
    if _is_adapted_under_zero3(head):
        # ZeRO-3 reduces the gradients of its weights by hooks on its children, which need an ordinary backward pass.
        return -(compute_target_log_probs(head, scale_fn, states, targets) * weights).sum()
    is_training = torch.is_grad_enabled()
    head_weights = [weight for weight in head.parameters() if is_training and weight.requires_grad]
    needs_states_grad = is_training and states.requires_grad

    def compute_all_chunks(states, num_chunks):
        if len(states) and hasattr(head, "fused_loss_fn"):  # set by `liger_kernels.use_liger_kernels`
            fused_loss_fn: Any = head.fused_loss_fn
            return fused_loss_fn(head, states, targets, weights, num_chunks, needs_states_grad, head_weights)
        chunks = zip(*(tensor.tensor_split(num_chunks) for tensor in (states, targets, weights)), strict=True)
        return compute_loss_and_gradients(
            lambda chunk: scale_fn(head.forward(chunk)), chunks, needs_states_grad, head_weights
        )

    if not head_weights:
        # The gradients of the states are known already, so the backward pass does not need a frozen head. Without a
        # graph, ZeRO-3 does not gather its weight there.
        with torch.no_grad():
            loss_and_gradients = _call_head_once(head, states, compute_all_chunks)
        return _PrecomputedGradients.apply(loss_and_gradients, states)
    return _call_head_once(
        head,
        states,
        lambda states, num_chunks: _PrecomputedGradients.apply(
            compute_all_chunks(states, num_chunks), states, *head_weights
        ),
    )


class _PrecomputedGradients(torch.autograd.Function):
    """A graph node for a loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss_and_gradients: tuple, states: torch.Tensor, *head_weights: nn.Parameter) -> torch.Tensor:
        loss, *gradients = loss_and_gradients
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, loss_gradient: torch.Tensor) -> tuple:
        states_grad, *weight_grads = (gradient * loss_gradient for gradient in ctx.saved_tensors)
        return None, states_grad if ctx.needs_input_grad[1] else None, *weight_grads


@torch.no_grad()
def compute_loss_and_gradients(
    logits_fn: Callable, chunks: Iterable, needs_states_grad: bool, head_weights: list[nn.Parameter]
) -> tuple:
    """Compute the weighted loss and its gradients chunk by chunk.

    Gradients of weights are summed over chunks in float32.

    Args:
        logits_fn: states (m, C) -> logits (m, V).
        chunks: tuples of states (m, C), targets (m,) and weights (m,).
        head_weights: the trainable weights that `logits_fn` uses.

    Returns:
        The scalar loss, its gradient for the states (n, C) (empty unless `needs_states_grad`), and one gradient for
        each of `head_weights`.
    """
    loss, states_grads, weight_grads = 0.0, [], []
    for states, targets, weights in chunks:
        states = states.detach().requires_grad_(needs_states_grad)
        inputs: list[torch.Tensor] = [states, *head_weights] if needs_states_grad else [*head_weights]
        chunk_loss, gradients = _compute_chunk(logits_fn, states, targets, weights, inputs)
        loss = loss + chunk_loss
        if needs_states_grad:
            states_grads.append(gradients.pop(0))
        if weight_grads:
            gradients = [total.add_(gradient) for total, gradient in zip(weight_grads, gradients, strict=True)]
        weight_grads = [gradient.float() for gradient in gradients]
    weight_grads = [gradient.to(weight.dtype) for gradient, weight in zip(weight_grads, head_weights, strict=True)]
    return loss, torch.cat(states_grads or [states[:0]]), *weight_grads


def _compute_chunk(
    logits_fn: Callable, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, inputs: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the weighted loss of one chunk and its gradients for `inputs`."""
    with torch.set_grad_enabled(bool(inputs)):
        logits = logits_fn(states)  # (m, V)
    log_probs = logits.detach().log_softmax(-1, dtype=torch.float32)
    loss = -(log_probs.gather(1, targets[:, None])[:, 0] * weights).sum()
    if not inputs:
        return loss, []
    # d loss / d logits = weight * (softmax(logits) - one_hot(target)), in the memory of the log-probabilities.
    logits_grad = log_probs.exp_()
    logits_grad[torch.arange(len(targets), device=targets.device), targets] -= 1
    logits_grad *= weights[:, None]
    gradients = torch.autograd.grad(logits, inputs, logits_grad.to(logits.dtype), allow_unused=True)
    # A disabled adapter has the gradient None.
    return loss, [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
