"""Attention within the documents of a packed row, by torch's own kernels.

It needs neither flash-attn nor an L x L mask: the kernel is called for one document at a time. It is registered in
transformers' attention interface and works in every LLM that supports that interface. `internvl_chat/decoder.py` passes
the boundaries of documents.

Shapes: B rows, H heads, L queries, S keys, D head dimension.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN_ATTENTION = "varlen_torch"  # its name in the attention interface
QUERY_BLOCK_SIZE = 1024  # number of queries at a time if a sliding window is shorter than the document


def use_varlen_attention(llm: PreTrainedModel, packed: bool) -> None:
    """Switch an LLM to this attention, unless it uses flash-attn.

    Args:
        packed: whether rows will hold several documents, which the LLM must keep apart.

    Raises:
        ValueError: `packed`, and the LLM has recurrent layers or does not support the attention interface.
    """
    is_supported = can_pack_documents(llm)
    if is_supported and llm.config._attn_implementation != "flash_attention_2":
        llm.set_attn_implementation(VARLEN_ATTENTION)
    if packed and not is_supported:
        raise ValueError(
            f"--use_packed_ds True is not supported for LLMs of type {llm.config.model_type}: the documents of a row "
            "would attend to each other. Train with --use_packed_ds False."
        )


def can_pack_documents(llm: PreTrainedModel) -> bool:
    """Return whether an LLM keeps the documents of a row apart."""
    return llm._supports_attention_backend and not llm._is_stateful


@torch.compiler.disable  # the document boundaries of the loop are known only at run time
def compute_varlen_attention(
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
    """Compute causal attention within each document.

    It has the signature of attention functions in transformers 5.

    Args:
        query: (B, H, L, D).
        key, value: (B, H', L, D), H a multiple of H'.
        cu_seq_lens_q: (documents + 1,) on the CPU, the start of each document of the only row, and L. Without it, as in
            generation, there is one document, and `attention_mask` applies.
        s_aux: (H,) attention sinks: logits of a key that has no value.

    Returns:
        The attention output (B, L, H, D), and None for the attention weights.
    """
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    if cu_seq_lens_q is None:
        if module.training:
            raise ValueError(
                f"{type(module).__name__} got no cu_seq_lens_q: varlen attention requires the boundaries of documents "
                "in training."
            )
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if attention_mask is None and query.shape[2] == 1:  # one new token attends to all cached tokens
            attention_mask = query.new_ones(1, key.shape[2], dtype=torch.bool)
        return _compute_attention(query, key, value, attention_mask, **options).transpose(1, 2), None
    bounds = cu_seq_lens_q.tolist()
    outputs = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        if sliding_window is not None and end - start > sliding_window:
            outputs += _compute_window_blocks(q, k, v, sliding_window, options)
        else:
            outputs.append(_compute_attention(q, k, v, None, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _compute_window_blocks(query, key, value, window: int, options: dict) -> list[torch.Tensor]:
    """Compute sliding-window attention of one document in blocks of queries.

    A token sees the last `window` tokens, including itself. The mask of a block has QUERY_BLOCK_SIZE rows and at most
    QUERY_BLOCK_SIZE + window - 1 columns.
    """
    length, outputs = query.shape[2], []
    for start in range(0, length, QUERY_BLOCK_SIZE):
        end, first_key = min(start + QUERY_BLOCK_SIZE, length), max(0, start - window + 1)
        query_positions = torch.arange(start, end, device=query.device)
        key_positions = torch.arange(first_key, end, device=query.device)
        distance = query_positions[:, None] - key_positions
        mask = (distance >= 0) & (distance < window)
        block = query[:, :, start:end], key[:, :, first_key:end], value[:, :, first_key:end]
        outputs.append(_compute_attention(*block, mask, **options))
    return outputs


def _compute_attention(query, key, value, mask, *, scaling, dropout, softcap, sinks) -> torch.Tensor:
    """Compute attention (B, H, L, D) of one document or block.

    `mask` (..., L, S) is True for visible keys; None means causal.
    """
    num_groups = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=num_groups > 1
        )
    # torch's kernels have neither a soft cap (Gemma 2) nor sinks (GPT-OSS).
    if mask is None:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # (B, H, L, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ value


def create_varlen_mask(batch_size, q_length, kv_length, *args, attention_mask=None, **kwargs) -> torch.Tensor | None:
    """Create a mask only for padding or cached tokens, as `sdpa_mask` does."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(VARLEN_ATTENTION, compute_varlen_attention)
AttentionMaskInterface.register(VARLEN_ATTENTION, create_varlen_mask)
