"""flash-attn's kernel of torch, computed on the CPU.

torch's `varlen_attn` ends in two operators that exist only for GPUs. Here they get kernels for the CPU, so that the
operators above them, their derivatives and their arguments run without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _iterate_documents(query, key, value, bounds, is_causal, scale, left, right) -> Iterator[tuple]:
    """Yield the slice, states (H, L, D) and attention weights (H, L, L) of each document in float32."""
    num_groups = query.shape[1] // key.shape[1]
    right = 0 if is_causal else right
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:end].float().transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(num_groups, dim=0) for x in (k, v))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        is_hidden = (distance < -right) if right >= 0 else torch.zeros_like(distance, dtype=torch.bool)
        if left >= 0:
            is_hidden |= distance > left
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(is_hidden, -torch.inf)
        yield slice(start, end), q, k, v, scores


def _read_options(query, scale=None, window_size_left=None, window_size_right=None, **kwargs) -> tuple:
    left, right = (-1 if size is None else size for size in (window_size_left, window_size_right))
    return query.shape[-1] ** -0.5 if scale is None else scale, left, right


def _compute_forward(
    query, key, value, bounds_q, bounds_k, max_q, max_k, dropout, is_causal, return_debug_mask, **options
):
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and torch.equal(bounds_q, bounds_k)
    assert max_q == max_k == bounds_q.diff().max() and dropout == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    scale, left, right = _read_options(query, **options)
    output, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for where, _, _, v, scores in _iterate_documents(query, key, value, bounds_q, is_causal, scale, left, right):
        output[where] = (scores.softmax(-1) @ v).transpose(0, 1).to(output.dtype)
        lse[:, where] = scores.logsumexp(-1)
    return output, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def _compute_backward(
    grad, query, key, value, output, lse, bounds_q, bounds_k, max_q, max_k, dropout, is_causal, *states, **options
):
    scale, left, right = _read_options(query, **options)
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    for where, q, k, v, scores in _iterate_documents(query, key, value, bounds_q, is_causal, scale, left, right):
        weights = (scores - lse[:, where, None]).exp()
        d_output, out = (x[where].float().transpose(0, 1) for x in (grad, output))
        d_scores = weights * (d_output @ v.transpose(1, 2) - (d_output * out).sum(-1, keepdim=True)) * scale
        results = (d_scores @ k, d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ d_output)
        for total, result in zip(grads, results, strict=True):  # sum over the queries of a head of keys
            summed = result.unflatten(0, (total.shape[1], -1)).sum(1)
            total[where] = summed.transpose(0, 1).to(total.dtype)
    return grads


@contextmanager
def flash_kernels_on_cpu() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _compute_forward, "CPU")
        library.impl("_flash_attention_backward", _compute_backward, "CPU")
        yield
