"""How the language model is run: with which attention, and on rows of several documents."""

import torch
import transformers
from packaging import version
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from internvl.model.internvl_chat.configuration_internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.documents import document_bounds
from internvl.model.internvl_chat.modeling_intern_vit import has_flash_attn

# From this version on transformers finds the documents of a row by their positions.
KEEPS_DOCUMENTS_APART = version.parse(transformers.__version__) >= version.parse("4.53")
# Decoders that make their masks without looking at positions, but take ready ones.
TAKES_MASKS = ("gpt_oss",)
# What computes attention document by document: flash-attn, and `model/varlen.py` where there is none.
BY_DOCUMENT = ("flash_attention_2", "varlen_torch")


def choose_attention(config: InternVLChatConfig, llm_class: type[PreTrainedModel], use_flash_attn: bool):
    """Notes in both parts of `config`, before they are built, what to compute attention with.

    What a checkpoint says about it is what its writer's machine had; this machine decides.
    """
    use = bool(use_flash_attn and has_flash_attn and torch.cuda.is_available())
    config.vision_config.use_flash_attn = use
    config.llm_config.attn_implementation = "flash_attention_2" if use else "eager"  # upstream's key, stored
    config.llm_config._attn_implementation = attention_of(llm_class, torch.get_default_dtype()) if use else None


def attention_of(llm_class: type[PreTrainedModel], dtype: torch.dtype) -> str | None:
    """What a language model computes attention with on this machine; None: the best of torch."""
    kernels = getattr(llm_class, "_compatible_flash_implementations", None) or ["flash_attention_2"]
    half = dtype in (torch.float16, torch.bfloat16)
    flash = half and has_flash_attn and torch.cuda.is_available() and "flash_attention_2" in kernels
    return "flash_attention_2" if flash else None


def decode(
    llm: PreTrainedModel,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: list[int] | None = None,
    **kwargs,
) -> ModelOutput:
    """Runs the decoder of `llm` on embeddings (B, L, C).

    Args:
        position_ids: (B, L); where they restart at 0, and there is no mask, another document begins.
        cu_seqlens: where that is, in the B rows laid end to end, and B L behind it; found out when not given, for which
            the device is waited for.

    Raises:
        ValueError: documents that this version of transformers cannot keep apart.
    """
    rows, by_positions = len(embeds), attention_mask is None and position_ids is not None
    if by_positions and not KEEPS_DOCUMENTS_APART and (position_ids[:, 1:] == 0).any():
        raise ValueError(
            f"transformers {transformers.__version__} does not keep the documents of a row apart by their positions: "
            "give an attention_mask, one document a row."
        )
    kernel = llm.config._attn_implementation
    by_document = by_positions and kernel in BY_DOCUMENT
    if by_document:
        starts = cu_seqlens or document_bounds(position_ids)
        # Several rows are one long row to these kernels.
        embeds, position_ids = embeds.flatten(0, 1)[None], position_ids.flatten()[None]
        bounds = torch.tensor(starts, dtype=torch.int32)
        longest = int(bounds.diff().max())
        if kernel == "flash_attention_2":
            bounds = bounds.to(embeds.device, non_blocking=True)
        kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    if by_positions and llm.config.model_type in TAKES_MASKS:
        attention_mask = masks_by_positions(llm, embeds, position_ids)
    outputs = getattr(llm, llm.base_model_prefix)(
        inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
    )
    if by_document:
        outputs.last_hidden_state = outputs.last_hidden_state.unflatten(1, (rows, -1))[0]
    return outputs


def masks_by_positions(llm: PreTrainedModel, embeds: torch.Tensor, position_ids: torch.Tensor) -> dict:
    """Kind of layer -> the mask that keeps documents apart; None where the attention kernel sees to it."""
    from transformers.masking_utils import create_masks_for_generate

    return create_masks_for_generate(llm.config, embeds, None, None, position_ids=position_ids)
