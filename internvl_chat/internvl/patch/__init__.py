"""Upstream's `internvl.patch`: a facade, so that code written for upstream imports what it is used to.

The collators are the real ones. The `replace_*` functions have nothing to replace here: attention kernels are chosen by
transformers' own setting, batches come from a plan, packed rows are told apart by their positions. They do nothing.
"""

from internvl.patch.pad_data_collator import (
    concat_pad_data_collator,
    dpo_concat_pad_data_collator,
    pad_data_collator,  # in place of the module of this name, as in upstream
)

__all__ = [
    "concat_pad_data_collator",
    "dpo_concat_pad_data_collator",
    "pad_data_collator",
    "apply_liger_kernel_to_internvit",
    "replace_gpt_oss_with_flash_sink_attn",
    "replace_internlm2_attention_class",
    "replace_llama2_attn_with_flash_attn",
    "replace_llama_attention_class",
    "replace_llama_attn_with_flash_attn",
    "replace_llama_rmsnorm_with_fused_rmsnorm",
    "replace_phi3_attention_class",
    "replace_qwen2_attention_class",
    "replace_qwen3_attention_class",
    "replace_train_dataloader",
    "replace_train_sampler",
]


def nothing_to_replace(model=None, use_varlen: bool = False) -> None:
    """Stands behind every `replace_*` name; those of InternVL 3.5 take arguments, which change nothing."""


apply_liger_kernel_to_internvit = nothing_to_replace
replace_gpt_oss_with_flash_sink_attn = nothing_to_replace
replace_internlm2_attention_class = nothing_to_replace
replace_llama2_attn_with_flash_attn = nothing_to_replace
replace_llama_attention_class = nothing_to_replace
replace_llama_attn_with_flash_attn = nothing_to_replace
replace_llama_rmsnorm_with_fused_rmsnorm = nothing_to_replace
replace_phi3_attention_class = nothing_to_replace
replace_qwen2_attention_class = nothing_to_replace
replace_qwen3_attention_class = nothing_to_replace
replace_train_dataloader = nothing_to_replace
replace_train_sampler = nothing_to_replace
