"""Configuration of InternLM2 in a checkpoint's own code."""

from typing import Any

from transformers import PretrainedConfig

DEFAULTS: dict[str, Any] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "bias": True,
    "rope_theta": 10000,
    "rope_scaling": None,
}


class InternLM2Config(PretrainedConfig):
    """Configuration of an InternLM2 model; the fields are those of `DEFAULTS`."""

    model_type = "internlm2"
    rope_parameters = None  # transformers 5 moves `rope_theta` and `rope_scaling` there

    def __init__(self, num_key_value_heads=None, **fields):
        super().__init__(**{**DEFAULTS, **fields})
        self.num_key_value_heads = num_key_value_heads or self.num_attention_heads
