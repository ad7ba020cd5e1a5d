"""The sizes of model that `tools/benchmark_step.py` measures, and the random model of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens

TILE_TOKENS = 256  # of published models: what is counted in tokens shrinks as a tile does
ROW_TOKENS, ROW_TILES = 8192, 40
SPECIAL = 16  # ids at the end of a vocabulary that no text has; the last is the image token


class Size(NamedTuple):
    """Fields of the configurations, what is computed in, rank of the adapters in both towers, samples of a pass."""

    vision: dict
    llm: dict
    dtype: torch.dtype
    rank: int
    samples: int


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


def _small(width: int, layers: int, vocabulary: int, side: int) -> tuple[dict, dict]:
    """InternVL2.5-1B's shapes, scaled to a width that both towers have; heads of 32 and 64 channels."""
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": width // 32, "image_size": side}
    llm = {"hidden_size": width, "intermediate_size": width * 4864 // 896, "num_hidden_layers": layers}
    llm |= {"num_attention_heads": max(2, width // 64), "num_key_value_heads": 1, "vocab_size": vocabulary}
    return VIT_300M | vision, QWEN_05B | llm


SIZES = {
    "test": Size(*_small(64, 2, 1024, 56), torch.float32, 2, 24),
    "tiny": Size(*_small(256, 12, 32768, 168), torch.float32, 8, 48),
    "1b": Size(VIT_300M, QWEN_05B, torch.bfloat16, 16, 512),
    "2b": Size(VIT_300M, INTERNLM_1_8B, torch.bfloat16, 16, 512),
    "8b": Size(VIT_300M, INTERNLM_7B, torch.bfloat16, 16, 256),
}


def config_of(size: Size) -> InternVLChatConfig:
    side = size.vision["image_size"]
    fields = {"force_image_size": side, "ps_version": "v2", "template": "internvl2_5"}
    return InternVLChatConfig(vision_config=dict(size.vision), llm_config=dict(size.llm), **fields)


def image_token_id(config: InternVLChatConfig) -> int:
    return config.llm_config.vocab_size - 1


def row_tokens(config: InternVLChatConfig) -> int:
    return ROW_TOKENS * count_image_tokens(config) // TILE_TOKENS


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """New weights are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_model(size: Size, seed: int = 0) -> InternVLChatModel:
    """The chat model with weights drawn by `seed`, on torch's current device."""
    torch.manual_seed(seed)
    with computing_in(size.dtype):
        model = InternVLChatModel(config_of(size))
    model.img_context_token_id = image_token_id(model.config)
    return model
