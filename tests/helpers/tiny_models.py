"""Tiny chat checkpoints with every language model, all numbers random; made for the tokenizer of the goldens."""

from pathlib import Path

import torch

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model
from internvl.model.tokenizers.loading import load_tokenizer

WIDTH = 32
LLM = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1009,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
LLMS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "rope_theta": 5e6},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "moe_intermediate_size": 24,
        **EXPERTS,
    },
    "gpt_oss": {"architectures": ["GptOssForCausalLM"], "num_local_experts": 4, **EXPERTS},
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 2e4},
    "phi3_su": {
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.2, 4.3, 7.8]},
    },
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "bias": False},
    "internlm2_bias_linear": {
        "architectures": ["InternLM2ForCausalLM"],
        "rope_theta": 1e6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "internlm2_dynamic": {
        "architectures": ["InternLM2ForCausalLM"],
        "max_position_embeddings": 24,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
}
VITS = {
    "300M": {**VIT, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    "6B": {**VIT, "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
}


def make(folder: Path, tokenizer: Path, llm: str = "qwen2", vit: str = "300M", **fields) -> InternVLChatModel:
    """A chat model, saved with its tokenizer in `folder`."""
    torch.manual_seed(len(llm))
    fields = {"force_image_size": 56, "template": "internvl2_5", "ps_version": "v2", **fields}
    fields = {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 4, **fields}
    model = InternVLChatModel(InternVLChatConfig(vision_config=VITS[vit], llm_config=LLM | LLMS[llm], **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return model


def save_adapters(model: InternVLChatModel, folder: Path) -> None:
    """A folder of PEFT's for each adapted part."""
    for part in LORA_RANK_FIELDS:
        if is_peft_model(module := getattr(model, part)):
            module.save_pretrained(folder / part, save_embedding_layers=False)
