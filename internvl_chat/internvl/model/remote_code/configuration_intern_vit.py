"""Configuration of InternViT in a checkpoint's own code."""

from typing import Any

from transformers import PretrainedConfig

# Of the first model with 6B parameters, whose config.json lacks some keys.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": False,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qk_normalization": True,
    "num_hidden_layers": 48,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "initializer_factor": 0.1,
}


class InternVisionConfig(PretrainedConfig):
    """Configuration of InternViT; the fields are those of `DEFAULTS`."""

    model_type = "intern_vit_6b"

    def __init__(self, **fields):
        super().__init__(**{**DEFAULTS, **fields})
