"""Attention implementation of the LLM, and its decoder on packed rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

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
VARLEN_TORCH = "varlen_torch"  # of `model/varlen_attention.py`, which is not part of the small patch for upstream


class FlashVersion(NamedTuple):
    """A version of flash-attn that transformers can call."""

    package: str
    module: str
    check: str  # the function of transformers.utils that looks for it, if the installed transformers supports it
    capabilities: range  # major compute capabilities of its GPUs


# Attention implementation of transformers -> version of flash-attn, the newest first.
FLASH_VERSIONS = {
    f"flash_attention_{number}": FlashVersion(package, module, f"is_flash_attn_{number}_available", capabilities)
    for number, package, module, capabilities in (
        (4, "flash-attn-4", "flash_attn.cute", range(9, 11)),  # Hopper, Blackwell of data centers
        (3, "flash-attn-3", "flash_attn_interface", range(9, 10)),
        (2, "flash-attn", "flash_attn", range(8, 100)),  # from Ampere on
    )
}
ATTN_IMPLEMENTATIONS = ("eager", "sdpa", *reversed(FLASH_VERSIONS))  # that a caller can request


@contextmanager
def configured_attention(
    config: InternVLChatConfig, llm_class: type[PreTrainedModel], use_flash_attn: bool
) -> Iterator[None]:
    """Set the attention implementation of both parts in `config`, while the model is built.

    Without a request, flash-attn is used if this machine can run it, else transformers' default.
    """
    requested = get_requested_attention(config, llm_class)
    is_flash_allowed = use_flash_attn and (requested is None or requested in FLASH_VERSIONS)
    is_vision_flash = is_flash_allowed and has_flash_attn and is_flash_available("flash_attention_2")
    config.vision_config.use_flash_attn = is_vision_flash
    # The attribute that transformers reads; None is its default.
    selected = select_attn_implementation(llm_class, torch.get_default_dtype()) if is_flash_allowed else None
    if has_soft_cap(config.llm_config):
        selected = selected or "eager"
    config.llm_config._attn_implementation = requested or selected
    # Upstream's InternLM2 reads this key. Afterwards it is the caller's request again, if there was one.
    before = vars(config.llm_config).get("attn_implementation")
    config.llm_config.attn_implementation = "flash_attention_2" if is_vision_flash else "eager"
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
    if requested in FLASH_VERSIONS:
        if not is_flash_available(requested):
            raise ValueError(
                f"attn_implementation {requested} requires the package {FLASH_VERSIONS[requested].package}, a version "
                "of transformers that supports it, and a GPU that it supports: use sdpa."
            )
        if not supports_flash_attn(llm_class, requested):
            raise ValueError(f"attn_implementation {requested} is not supported by {llm_class.__name__}: use eager.")
    if requested == "sdpa" and has_soft_cap(config.llm_config):
        raise ValueError(f"attn_implementation sdpa is not supported by {llm_class.__name__}: use eager.")
    return requested


def has_soft_cap(llm_config: Any) -> bool:
    """Return whether attention logits are capped, which `sdpa` of transformers < 5.21 ignores."""
    return bool(getattr(llm_config, "attn_logit_softcapping", None))


def is_flash_available(implementation: str) -> bool:
    """Return whether this machine can run a version of flash-attn."""
    flash = FLASH_VERSIONS[implementation]
    is_installed = getattr(transformers.utils, flash.check, lambda: False)
    if not (torch.cuda.is_available() and is_installed()):
        return False
    try:
        import_module(flash.module)  # a package that was built for another version of torch fails
    except ImportError:
        return False
    return torch.cuda.get_device_capability()[0] in flash.capabilities


def supports_flash_attn(llm_class: type[PreTrainedModel], implementation: str) -> bool:
    """Return whether a version of flash-attn can compute an LLM's attention."""
    # Before transformers 4.54 the name ended in _2.
    is_supported = any(getattr(llm_class, f"_supports_flash_attn{suffix}", False) for suffix in ("", "_2"))
    # transformers 5 lists the versions here. GPT-OSS has attention sinks, which only flash-attn 4 supports.
    compatible = getattr(llm_class, "_compatible_flash_implementations", None)
    return is_supported and implementation in (compatible or FLASH_VERSIONS)


def select_attn_implementation(llm_class: type[PreTrainedModel], dtype: torch.dtype) -> str | None:
    """Select the newest flash-attn for an LLM that this machine can run.

    Otherwise None, which is transformers' default.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    candidates = (name for name in FLASH_VERSIONS if supports_flash_attn(llm_class, name))
    return next(filter(is_flash_available, candidates), None)


class DocumentBoundaries:
    """Boundaries of the documents of a row, on the CPU and on its device.

    An object, not a list: compiled layers pass it on unseen, while they are compiled again for each new list.
    """

    def __init__(self, cu_seqlens: list[int], device: torch.device):
        self.lengths = [end - start for start, end in pairwise(cu_seqlens)]
        self.max_length = max(self.lengths)
        # (documents + 1,) int32. From pinned memory the copy does not wait for the GPU.
        on_cpu = torch.tensor(cu_seqlens, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        self.cu_seqlens = on_cpu.to(device, non_blocking=True)


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
    is_varlen = is_packed and (implementation == VARLEN_TORCH or implementation in FLASH_VERSIONS)
    if is_varlen:
        assert position_ids is not None  # part of `is_packed`
        documents = DocumentBoundaries(cu_seqlens or compute_cu_seqlens(position_ids), embeds.device)
        # These kernels take a single row: (B, L, C) -> (1, B * L, C).
        embeds, position_ids = embeds.flatten(0, 1)[None], position_ids.flatten()[None]
        if implementation == VARLEN_TORCH:
            kwargs["documents"] = documents
            # It needs no mask. transformers 5 would look for documents in `position_ids`, which waits for the GPU, but
            # passes on a 4-d mask as it is.
            attention_mask = embeds.new_empty(1, 1, 0, 0)
        else:
            kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), documents.cu_seqlens)
            kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), documents.max_length)
    if is_packed and attention_mask is None and llm.config.model_type in MODEL_TYPES_NEEDING_MASKS:
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

    arguments: dict[str, Any] = {CACHE_NAME: None, "position_ids": position_ids}
    return create_masks_for_generate(llm.config, embeds, attention_mask=None, **arguments)
