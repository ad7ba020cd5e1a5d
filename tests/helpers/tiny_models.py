"""Tiny chat models with random weights, for every LLM.

Their vocabulary is that of the tokenizer in the goldens.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model
from internvl.model.tokenizers.loading import load_tokenizer

LLM_WIDTH = 32
TINY_LLM = {
    "hidden_size": LLM_WIDTH,
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
EXPERT_FIELDS = {"num_experts_per_tok": 2, "head_dim": 16}
TINY_LLMS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "rope_theta": 5e6},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "moe_intermediate_size": 24,
        **EXPERT_FIELDS,
    },
    "gpt_oss": {"architectures": ["GptOssForCausalLM"], "num_local_experts": 4, **EXPERT_FIELDS},
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
TINY_VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
}
TINY_VITS = {
    "300M": {**TINY_VIT, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    "6B": {**TINY_VIT, "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
}


MOE_FIELDS = {**EXPERT_FIELDS, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24}
# Architectures of transformers -> fields of their configuration beyond TINY_LLM.
ARCHITECTURES = {
    # InternVL 3.5; LoRA targets from `lora.LLM_TARGETS`
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Qwen3MoeForCausalLM": MOE_FIELDS,
    "GptOssForCausalLM": {**MOE_FIELDS, "sliding_window": 8},
    # dense; LoRA targets are inferred
    "CohereForCausalLM": {"logit_scale": 0.5},
    "GPT2LMHeadModel": {"n_head": 4, "n_layer": 2, "n_embd": 32, "n_positions": 512},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    "GraniteForCausalLM": {"logits_scaling": 4.0},
    "MistralForCausalLM": {"head_dim": 8},
    "Olmo2ForCausalLM": {},
    "PhiForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    # mixtures of experts; LoRA targets are inferred
    "GraniteMoeForCausalLM": {**MOE_FIELDS, "logits_scaling": 4.0},
    "MixtralForCausalLM": MOE_FIELDS,
    "Qwen2MoeForCausalLM": {**MOE_FIELDS, "shared_expert_intermediate_size": 24},
}
RANDOM_IDS = torch.randint(3, 1000, (2, 12), generator=torch.Generator().manual_seed(0))


def build_tiny_model(
    llm: str,
    *changes: Callable[[InternVLChatModel], object],
    model_class: type[InternVLChatModel] = InternVLChatModel,
    **llm_fields,
) -> InternVLChatModel:
    """Build a chat model with reproducible random weights in the LLM.

    Args:
        llm: a key of TINY_LLMS, or an architecture of transformers.
        changes: functions that modify the model before its weights are drawn; they may add adapters.
    """
    fields = TINY_LLMS.get(llm) or {"architectures": [llm], **ARCHITECTURES.get(llm, {})}
    torch.manual_seed(0)
    config = InternVLChatConfig(TINY_VITS["300M"], TINY_LLM | fields | llm_fields, template="internvl2_5")
    model = model_class(config)
    for change in changes:
        change(model)
    randomize_weights(model.language_model, 0.2)
    return model


@torch.no_grad()
def randomize_weights(module: nn.Module, std: float) -> None:
    """Draw all parameters anew; norms and biases have the mean 1."""
    for parameter in module.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, std)


def make_tiny_checkpoint(
    folder: Path, tokenizer: Path, llm: str = "qwen2", vit: str = "300M", **fields
) -> InternVLChatModel:
    """Save a chat model and its tokenizer in `folder`."""
    torch.manual_seed(len(llm))
    fields = {"force_image_size": 56, "template": "internvl2_5", "ps_version": "v2", **fields}
    fields = {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 4, **fields}
    config = InternVLChatConfig(vision_config=TINY_VITS[vit], llm_config=TINY_LLM | TINY_LLMS[llm], **fields)
    model = InternVLChatModel(config).eval()
    randomize_weights(model, 0.3)
    model.save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)
    return model


def save_part_adapters(model: InternVLChatModel, folder: Path) -> None:
    """Save the adapters of each part in a folder of PEFT's format."""
    for part in LORA_RANK_FIELDS:
        if is_peft_model(module := getattr(model, part)):
            module.save_pretrained(folder / part, save_embedding_layers=False)
