"""Attention within the documents of a packed row, by torch's own kernels.

It needs neither flash-attn nor an L x L mask. On a GPU one kernel computes all documents. Where that kernel cannot run,
another is called for one document at a time: a loop. On a Hopper GPU the loop is slow, because cuDNN plans its kernel
anew for each length of a document. The attention is registered in transformers' attention interface and works in every
LLM that supports that interface. `internvl_chat/decoder.py` passes the boundaries of documents.

Shapes: B rows, H heads, L queries, S keys, D head dimension.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from internvl.model.internvl_chat.decoder import FLASH_VERSIONS, VARLEN_TORCH, DocumentBoundaries

try:
    from torch.nn.attention.varlen import varlen_attn

    # 2.10: is_causal; from 2.11 on: scale and window_size instead; later also enable_gqa.
    VARLEN_ATTN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # torch < 2.10
    VARLEN_ATTN_ARGUMENTS = frozenset()

QUERY_BLOCK_SIZE = 1024  # number of queries at a time if a sliding window is shorter than the document


def use_varlen_attention(llm: PreTrainedModel, packed: bool) -> None:
    """Switch an LLM to this attention, unless it uses flash-attn.

    Args:
        packed: whether rows will hold several documents, which the LLM must keep apart.

    Raises:
        ValueError: `packed`, and the LLM has recurrent layers or does not support the attention interface.
    """
    is_supported = can_pack_documents(llm)
    if is_supported and llm.config._attn_implementation not in FLASH_VERSIONS:
        llm.set_attn_implementation(VARLEN_TORCH)
    if packed and not is_supported:
        raise ValueError(
            f"--use_packed_ds True is not supported for LLMs of type {llm.config.model_type}: the documents of a row "
            "would attend to each other. Train with --use_packed_ds False."
        )


def can_pack_documents(llm: PreTrainedModel) -> bool:
    """Return whether an LLM keeps the documents of a row apart."""
    return llm._supports_attention_backend and not llm._is_stateful


@torch.compiler.disable  # lengths of documents are known only at run time
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
    documents: DocumentBoundaries | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention within each document.

    It has the signature of attention functions in transformers 5.

    Args:
        query: (B, H, L, D).
        key, value: (B, H', L, D), H a multiple of H'.
        documents: those of the only row. Without them, as in generation, there is one, and `attention_mask` applies.
        s_aux: (H,) attention sinks: logits of a key that has no value.

    Returns:
        The attention output (B, L, H, D), and None for the attention weights.
    """
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "sinks": s_aux}
    if documents is None:
        if module.training:
            raise ValueError(
                f"{type(module).__name__} got no documents: varlen attention requires their boundaries in training."
            )
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        if attention_mask is None and query.shape[2] == 1:  # one new token attends to all cached tokens
            attention_mask = query.new_ones(1, key.shape[2], dtype=torch.bool)
        return _compute_attention(query, key, value, attention_mask, **options).transpose(1, 2), None
    window = sliding_window if sliding_window is not None and sliding_window < documents.max_length else None
    is_plain = softcap is None and s_aux is None and not dropout
    if is_plain and can_use_kernel(query, value, scaling, window):
        return _compute_by_kernel(query, key, value, documents, scaling, window), None
    outputs = []
    # `split`, not slices: the backward pass of each slice makes a tensor of the size of the row.
    for q, k, v in zip(*(states.split(documents.lengths, dim=2) for states in (query, key, value)), strict=True):
        if window is not None and q.shape[2] > window:
            outputs += _compute_window_blocks(q, k, v, window, options)
        else:
            outputs.append(_compute_attention(q, k, v, None, **options))
    # In one layout, however many documents there are: compiled layers would be compiled again for another one.
    outputs = [output.transpose(1, 2) for output in outputs]  # (B, documents' L, H, D)
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def can_use_kernel(query: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None) -> bool:
    """Return whether one kernel of torch can compute all documents."""
    head_dim = query.shape[-1]
    is_supported_call = "window_size" in VARLEN_ATTN_ARGUMENTS or (
        "is_causal" in VARLEN_ATTN_ARGUMENTS and window is None and scaling in (None, head_dim**-0.5)
    )
    return (
        is_supported_call
        and _get_compute_dtype(query) in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim <= 256
        and head_dim % 8 == 0
        and _has_flash_kernel(query.device)
    )


@cache
def _has_flash_kernel(device: torch.device) -> bool:
    """Return whether flash-attn's kernel in torch supports a device: a GPU from Ampere on.

    Where there is no GPU, CUDA tensors are fake ones that stand for those of a recent GPU.
    """
    is_cuda = device.type == "cuda"
    return is_cuda and (not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 8)


def _get_compute_dtype(query: torch.Tensor) -> torch.dtype:
    """Return the dtype that attention computes in, with autocast or without."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


def _compute_by_kernel(query, key, value, documents: DocumentBoundaries, scaling, window: int | None) -> torch.Tensor:
    """Compute attention (1, L, H, D) of all documents at once."""
    dtype = _get_compute_dtype(query)  # autocast does not know this operator
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # (L, H or H', D)
    # `window_size` counts the keys before and after a query; (-1, 0) is causal attention without a window. The kernel
    # of every version takes fewer heads of keys than of queries; `enable_gqa` only allows it.
    window_size = (-1 if window is None else window - 1, 0)
    options: dict[str, Any] = {"is_causal": True, "scale": scaling, "window_size": window_size, "enable_gqa": True}
    options = {name: option for name, option in options.items() if name in VARLEN_ATTN_ARGUMENTS}
    bounds, length = documents.cu_seqlens, documents.max_length
    output = varlen_attn(query, key, value, bounds, bounds, length, length, **options)
    return output[None]  # pyrefly: ignore[bad-index]


def _compute_window_blocks(query, key, value, window: int, options: dict) -> list[torch.Tensor]:
    """Compute sliding-window attention of one document in blocks of queries.

    A token sees the last `window` tokens, including itself. The mask of a block has QUERY_BLOCK_SIZE rows and at most
    QUERY_BLOCK_SIZE + window - 1 columns.
    """
    end, outputs = 0, []
    for q in query.split(QUERY_BLOCK_SIZE, dim=2):
        start, end = end, end + q.shape[2]
        first_key = max(0, start - window + 1)
        query_positions = torch.arange(start, end, device=query.device)
        key_positions = torch.arange(first_key, end, device=query.device)
        distance = query_positions[:, None] - key_positions
        mask = (distance >= 0) & (distance < window)
        k, v = (states[:, :, first_key:end] for states in (key, value))
        outputs.append(_compute_attention(q, k, v, mask, **options))
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


def create_varlen_mask(q_length: int, kv_length: int, attention_mask=None, **kwargs) -> torch.Tensor | None:
    """Create a mask only for padding or cached tokens, as `sdpa_mask` does."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(VARLEN_TORCH, compute_varlen_attention)
AttentionMaskInterface.register(VARLEN_TORCH, create_varlen_mask)
