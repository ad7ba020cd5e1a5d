"""Names of upstream's `internvl.patch`, for code written for upstream; the modules beside this one have them, too.

The collators are the real ones. The `replace_*` functions do nothing, see `replaced_functions.py`.
"""

from internvl.patch.pad_data_collator import (
    concat_pad_data_collator,
    dpo_concat_pad_data_collator,
    pad_data_collator,  # the function hides the submodule of this name, as in upstream
)
from internvl.patch.replaced_functions import (
    apply_liger_kernel_to_internvit,
    replace_gpt_oss_with_flash_sink_attn,
    replace_internlm2_attention_class,
    replace_llama2_attn_with_flash_attn,
    replace_llama_attention_class,
    replace_llama_attn_with_flash_attn,
    replace_llama_rmsnorm_with_fused_rmsnorm,
    replace_phi3_attention_class,
    replace_qwen2_attention_class,
    replace_qwen3_attention_class,
    replace_train_dataloader,
    replace_train_sampler,
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
