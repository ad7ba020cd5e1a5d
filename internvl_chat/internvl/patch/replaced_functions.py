"""Upstream's functions that replace parts of libraries. Here they do nothing.

Attention kernels are selected by transformers' `attn_implementation`, batches come from the epoch plan, and packed
sequences are separated by their position ids.
"""


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
