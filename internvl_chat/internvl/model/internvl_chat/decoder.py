"""Attention implementation of the LLM, and its decoder on packed rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging import version
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from internvl.model.internvl_chat.configuration_internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.documents import compute_cu_seqlens
from internvl.model.internvl_chat.modeling_intern_vit import has_flash_attn

# From 4.53 on, transformers derives the documents of a row from its positions.
HAS_PACKED_MASKS = version.parse(transformers.__version__) >= version.parse("4.53")
# Name of the KV cache in arguments and outputs: 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Model types whose decoder ignores positions when it creates masks, but accepts masks from the caller.
MODEL_TYPES_NEEDING_MASKS = ("gpt_oss",)
ATTN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")  # that a caller can request
# Attention implementations that take cumulative document lengths: flash-attn, and `model/varlen_attention.py`, which is
# not part of the small patch for upstream.
VARLEN_IMPLEMENTATIONS = ("flash_attention_2", "varlen_torch")


@contextmanager
def configured_attention(
    config: InternVLChatConfig, llm_class: type[PreTrainedModel], use_flash_attn: bool
) -> Iterator[None]:
    """Set the attention implementation of both parts in `config`, while the model is built.

    Without a request, flash-attn is used if this machine can run it, else transformers' default.
    """
    requested = get_requested_attention(config, llm_class)
    is_flash_allowed = use_flash_attn and requested in (None, "flash_attention_2")
    can_use_flash_attn = bool(is_flash_allowed and has_flash_attn and torch.cuda.is_available())
    config.vision_config.use_flash_attn = can_use_flash_attn
    # The attribute that transformers reads; None is its default.
    selected = select_attn_implementation(llm_class, torch.get_default_dtype()) if can_use_flash_attn else None
    config.llm_config._attn_implementation = requested or selected
    # Upstream's InternLM2 reads this key. Afterwards it is the caller's request again, if there was one.
    before = vars(config.llm_config).get("attn_implementation")
    config.llm_config.attn_implementation = "flash_attention_2" if can_use_flash_attn else "eager"
    yield
    config.llm_config.attn_implementation = before
    if before is None:
        del config.llm_config.attn_implementation


def get_requested_attention(config: InternVLChatConfig, llm_class: type[PreTrainedModel]) -> str | None:
    """Return the attention implementation that the caller has requested.

    That is `attn_implementation` of the chat model, or upstream's `llm_config.attn_implementation`. The value in a
    `config.json` describes its author's machine; the configuration does not keep it.

    Raises:
        ValueError: it is not supported, or not available on this machine.
    """
    requested = config.attn_implementation
    if requested is None and HAS_PACKED_MASKS:  # with older versions, upstream's InternLM2Config has a default
        requested = getattr(config.llm_config, "attn_implementation", None)
    if requested is not None and requested not in ATTN_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation {requested!r:.80} is not supported: expected {', '.join(ATTN_IMPLEMENTATIONS)}."
        )
    if requested == "flash_attention_2":
        if not (has_flash_attn and torch.cuda.is_available()):
            raise ValueError(f"attn_implementation {requested} requires the package flash-attn and a GPU: use sdpa.")
        if not supports_flash_attn(llm_class):
            raise ValueError(f"attn_implementation {requested} is not supported by {llm_class.__name__}: use eager.")
    return requested


def supports_flash_attn(llm_class: type[PreTrainedModel]) -> bool:
    """Return whether flash-attn 2 can compute an LLM's attention."""
    # GPT-OSS has attention sinks, which flash-attn 2 does not support: transformers 5 does not list it here.
    compatible = getattr(llm_class, "_compatible_flash_implementations", None)
    return "flash_attention_2" in (compatible or ["flash_attention_2"])


def select_attn_implementation(llm_class: type[PreTrainedModel], dtype: torch.dtype) -> str | None:
    """Select flash-attn for an LLM if this machine can run it.

    Otherwise None, which is transformers' default.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    can_use_flash_attn = is_half and has_flash_attn and torch.cuda.is_available() and supports_flash_attn(llm_class)
    return "flash_attention_2" if can_use_flash_attn else None


def run_decoder(
    llm: PreTrainedModel,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: list[int] | None = None,
    **kwargs,
) -> Any:
    """Run the LLM without its head on embeddings (B, L, C).

    Args:
        position_ids: (B, L); without `attention_mask` they restart at 0 for each document.
        cu_seqlens: cumulative document lengths over the flattened rows, [0, ..., B * L]. Without it they are computed
            from `position_ids`, which synchronizes with the GPU.

    Raises:
        ValueError: a row has several documents, and this version of transformers does not keep them apart.
    """
    num_rows, is_packed = len(embeds), attention_mask is None and position_ids is not None
    if is_packed and not HAS_PACKED_MASKS and (position_ids[:, 1:] == 0).any():  # pyrefly: ignore[unsupported-operation]
        raise ValueError(
            f"Packed rows are not supported with transformers {transformers.__version__}, which does not derive "
            "documents from position_ids: give an attention_mask and one document a row."
        )
    implementation = llm.config._attn_implementation
    is_varlen = is_packed and implementation in VARLEN_IMPLEMENTATIONS
    if is_varlen:
        assert position_ids is not None  # part of `is_packed`
        lengths = cu_seqlens or compute_cu_seqlens(position_ids)
        # These kernels take a single row: (B, L, C) -> (1, B * L, C).
        embeds, position_ids = embeds.flatten(0, 1)[None], position_ids.flatten()[None]
        cu_seq_lens = torch.tensor(lengths, dtype=torch.int32)
        max_length = int(cu_seq_lens.diff().max())
        if implementation == "flash_attention_2":
            cu_seq_lens = cu_seq_lens.to(embeds.device, non_blocking=True)
        kwargs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        kwargs |= {"max_length_q": max_length, "max_length_k": max_length}
    if is_packed and llm.config.model_type in MODEL_TYPES_NEEDING_MASKS:
        assert position_ids is not None
        attention_mask = create_packed_masks(llm, embeds, position_ids)
    outputs = getattr(llm, llm.base_model_prefix)(
        inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
    )
    if is_varlen:
        outputs.last_hidden_state = outputs.last_hidden_state.unflatten(1, (num_rows, -1))[0]
    return outputs


def create_packed_masks(llm: PreTrainedModel, embeds: torch.Tensor, position_ids: torch.Tensor) -> dict:
    """Create masks that keep documents apart, by type of layer.

    A mask is None where the attention implementation keeps them apart itself.
    """
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate(llm.config, embeds, None, None, position_ids=position_ids)
