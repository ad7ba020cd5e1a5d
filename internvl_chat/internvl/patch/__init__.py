"""Names of upstream's `internvl.patch`, for code written for upstream.

The collators are the real ones. The `replace_*` functions do nothing: attention kernels are selected by transformers'
`attn_implementation`, batches come from the epoch plan, and packed sequences are separated by their position ids.
"""

from internvl.patch.pad_data_collator import (
    concat_pad_data_collator,
    dpo_concat_pad_data_collator,
    pad_data_collator,  # the function hides the submodule of this name, as in upstream
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


def do_nothing(model=None, use_varlen: bool = False) -> None:
    """Accept the arguments of a `replace_*` function of upstream and ignore them.

    Some functions of InternVL 3.5 take the model; the others take no arguments.
    """


apply_liger_kernel_to_internvit = do_nothing
replace_gpt_oss_with_flash_sink_attn = do_nothing
replace_internlm2_attention_class = do_nothing
replace_llama2_attn_with_flash_attn = do_nothing
replace_llama_attention_class = do_nothing
replace_llama_attn_with_flash_attn = do_nothing
replace_llama_rmsnorm_with_fused_rmsnorm = do_nothing
replace_phi3_attention_class = do_nothing
replace_qwen2_attention_class = do_nothing
replace_qwen3_attention_class = do_nothing
replace_train_dataloader = do_nothing
replace_train_sampler = do_nothing
