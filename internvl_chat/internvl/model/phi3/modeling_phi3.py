"""Upstream's path to the Phi-3 models, which are transformers'."""

from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3DecoderLayer,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3MLP,
    Phi3Model,
    Phi3PreTrainedModel,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
    rotate_half,
)

from internvl.model.internvl_chat.modeling_intern_vit import has_flash_attn

# Upstream's names. In transformers one class supports all attention kernels.
Phi3FlashAttention2 = Phi3SdpaAttention = Phi3Attention
PHI3_ATTENTION_CLASSES = dict.fromkeys(("eager", "flash_attention_2", "sdpa"), Phi3Attention)

__all__ = [
    "PHI3_ATTENTION_CLASSES",
    "Phi3Attention",
    "Phi3DecoderLayer",
    "Phi3FlashAttention2",
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "Phi3MLP",
    "Phi3Model",
    "Phi3PreTrainedModel",
    "Phi3RMSNorm",
    "Phi3RotaryEmbedding",
    "Phi3SdpaAttention",
    "apply_rotary_pos_emb",
    "has_flash_attn",
    "repeat_kv",
    "rotate_half",
]
