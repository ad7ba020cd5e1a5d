"""Attention on rows of several documents without flash-attn and without an L x L mask: torch's own kernels, a document
at a time.

Registered with transformers' attention interface, so that every language model that goes through it can use it.
`decoder.py` hands down where documents begin.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "varlen_torch"
BLOCK = 1024  # queries at a time where a window slides over a longer document


def use_varlen_attention(llm: PreTrainedModel, packed: bool) -> None:
    """Let a language model that does not run on flash-attn compute attention here.

    Args:
        packed: rows will hold several documents: the model must keep them apart.

    Raises:
        ValueError: it cannot, because it has recurrent layers or computes attention in a way of its own.
    """
    able = llm._supports_attention_backend and not llm._is_stateful
    if able and llm.config._attn_implementation != "flash_attention_2":
        llm.set_attn_implementation(NAME)
    if packed and not able:
        raise ValueError(
            f"--use_packed_ds True: in language models of type {llm.config.model_type} the documents of a row see each "
            "other; train without it."
        )


@torch.compiler.disable  # a loop over numbers that are only known when it runs
def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document; an attention function as transformers calls it.

    Args:
        query: (B, H, L, D). key, value: (B, H', L, D), H' a divisor of H.
        cu_seq_lens_q: (documents + 1,) on the CPU: where each document of the one row begins, and L. Without it there
            is one document, and `attention_mask` says what is seen.
        s_aux: (H,) a logit for looking at nothing.

    Returns:
        (B, L, H, D) and None.
    """
    score = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    if cu_seq_lens_q is None:
        if module.training:
            raise ValueError(f"{type(module).__name__} was not told where documents begin: it cannot keep them apart")
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if attention_mask is None and query.shape[2] == 1:
            attention_mask = query.new_ones(1, key.shape[2], dtype=torch.bool)
        return _attend(query, key, value, attention_mask, **score).transpose(1, 2), None
    bounds = cu_seq_lens_q.tolist()
    parts = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        document = [states[:, :, start:end] for states in (query, key, value)]
        if sliding_window is not None and end - start > sliding_window:
            parts += _windows(*document, sliding_window, score)
        else:
            parts.append(_attend(*document, None, **score))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _windows(query, key, value, window: int, score: dict) -> list[torch.Tensor]:
    """Attention of a document whose tokens see the last `window` tokens, themselves included, in blocks."""
    length, parts = query.shape[2], []
    for start in range(0, length, BLOCK):
        end, first = min(start + BLOCK, length), max(0, start - window + 1)
        distance = torch.arange(start, end, device=query.device)[:, None] - torch.arange(
            first, end, device=query.device
        )
        seen = (distance >= 0) & (distance < window)
        parts.append(_attend(query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], seen, **score))
    return parts


def _attend(query, key, value, seen, *, scaling, dropout, softcap, sinks) -> torch.Tensor:
    """(B, H, L, D); `seen` (..., L, S) bool, None for causal."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, seen, dropout, is_causal=seen is None, scale=scaling, enable_gqa=groups > 1
        )
    if seen is None:
        seen = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ value


def varlen_mask(batch_size, q_length, kv_length, *args, attention_mask=None, **kwargs) -> torch.Tensor | None:
    """No mask where attention is causal or by document; transformers' own for padding and for cached tokens."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, varlen_mask)
