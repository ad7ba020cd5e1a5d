"""Model sizes of `tools/benchmark_step.py` and random models of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens

TILE_TOKENS = 256  # image tokens per tile of the published models
ROW_TOKENS, ROW_TILES = 8192, 40  # limits of a packed row for the published models
NUM_RESERVED_IDS = 16  # at the end of the vocabulary, never drawn as text; the last one is the image token


class ModelSize(NamedTuple):
    """Configuration fields, data type, LoRA rank and samples per turn."""

    vision: dict
    llm: dict
    dtype: torch.dtype
    rank: int  # of the adapters in the vision encoder and in the LLM
    num_samples: int  # a multiple of 4


VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "qkv_bias": True,
}
QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151674,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
INTERNLM_1_8B = {
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 92553,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rms_norm_eps": 1e-5,
}
INTERNLM_7B = INTERNLM_1_8B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def _scale_down(hidden_size: int, num_layers: int, vocab_size: int, image_size: int) -> tuple[dict, dict]:
    """Scale InternVL2.5-1B to one hidden size for vision encoder and LLM.

    Attention heads have 32 channels in the vision encoder and 64 in the LLM. The MLPs keep their width relative to
    the hidden size.
    """
    vision = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers}
    vision |= {"num_attention_heads": hidden_size // 32, "image_size": image_size}
    llm = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 4864 // 896, "num_hidden_layers": num_layers}
    llm |= {"num_attention_heads": max(2, hidden_size // 64), "num_key_value_heads": 1, "vocab_size": vocab_size}
    return VIT_300M | vision, QWEN_05B | llm


MODEL_SIZES = {
    "test": ModelSize(*_scale_down(64, 2, 1024, 56), torch.float32, 2, 12),
    "tiny": ModelSize(*_scale_down(256, 12, 32768, 168), torch.float32, 8, 8),
    "1b": ModelSize(VIT_300M, QWEN_05B, torch.bfloat16, 16, 32),
    "2b": ModelSize(VIT_300M, INTERNLM_1_8B, torch.bfloat16, 16, 32),
    "8b": ModelSize(VIT_300M, INTERNLM_7B, torch.bfloat16, 16, 16),
}


def build_config(size: ModelSize) -> InternVLChatConfig:
    """Build the chat model's configuration of a size."""
    fields = {"force_image_size": size.vision["image_size"], "ps_version": "v2", "template": "internvl2_5"}
    return InternVLChatConfig(vision_config=dict(size.vision), llm_config=dict(size.llm), **fields)


def get_image_token_id(config: InternVLChatConfig) -> int:
    """Return the id of the image token, the last of the vocabulary."""
    return config.llm_config.vocab_size - 1


def get_max_row_tokens(config: InternVLChatConfig) -> int:
    """Return the tokens of a full row, scaled by tokens per tile."""
    return ROW_TOKENS * count_image_tokens(config) // TILE_TOKENS


@contextmanager
def set_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new parameters in `dtype` inside the context."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_random_model(size: ModelSize, seed: int = 0) -> InternVLChatModel:
    """Build the chat model with random weights on torch's current device."""
    torch.manual_seed(seed)
    with set_default_dtype(size.dtype):
        model = InternVLChatModel(build_config(size))
    model.img_context_token_id = get_image_token_id(model.config)
    return model
