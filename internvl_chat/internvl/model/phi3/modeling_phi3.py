"""Upstream's path to the Phi-3 language model: transformers' own, whose parameter names are the same."""

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

__all__ = [
    "Phi3Attention",
    "Phi3DecoderLayer",
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "Phi3MLP",
    "Phi3Model",
    "Phi3PreTrainedModel",
    "Phi3RMSNorm",
    "Phi3RotaryEmbedding",
    "apply_rotary_pos_emb",
    "repeat_kv",
    "rotate_half",
]
